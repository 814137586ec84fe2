"use strict";
// The trained network: its decoder, and its encoder where that fits into the page.
// Shapes: I input capsules, J classes, K and D dimensions of an input and a class capsule.

function bytesOf(id) {
  const text = atob(document.getElementById(id).textContent);
  return Uint8Array.from(text, (letter) => letter.charCodeAt(0));
}

function floatsOf(id) {
  return new Float32Array(bytesOf(id).buffer);
}

// Half precision (IEEE 754): a sign, 5 bits of exponent, 10 of mantissa.
function halvesOf(id) {
  const bits = new Uint16Array(bytesOf(id).buffer);
  return Float32Array.from(bits, (half) => {
    const sign = half & 0x8000 ? -1 : 1;
    const exponent = (half >> 10) & 31;
    const mantissa = half & 1023;
    if (exponent === 0) return sign * mantissa * 2 ** -24;
    return sign * (1 + mantissa / 1024) * 2 ** (exponent - 15);
  });
}

// Hands out consecutive parts of an array of weights.
function reader(weights) {
  let start = 0;
  return (length) => weights.subarray(start, (start += length));
}

// Eq. 1: v = ‖s‖² / (1 + ‖s‖²) · s / ‖s‖, in place.
function squash(values, start, length) {
  const norm = lengthOf(values, start, length);
  for (let d = start; d < start + length; d++) values[d] *= norm / (1 + norm * norm);
}

function lengthOf(values, start, length) {
  let sum = 0;
  for (let d = start; d < start + length; d++) sum += values[d] * values[d];
  return Math.sqrt(sum);
}

class Decoder {
  constructor(sizes, weights, dimensions) {
    const next = reader(weights);
    this.dimensions = dimensions;
    this.layers = sizes.map(([inputs, outputs]) => ({
      outputs,
      weights: next(inputs * outputs),
      bias: next(outputs),
    }));
  }

  // Draws one class from its capsule, all others masked out (§4.1): pixels in [0, 1].
  draw(capsule, label) {
    let values = capsule;
    let first = label * this.dimensions;
    this.layers.forEach(({ outputs, weights, bias }, number) => {
      const sums = Float32Array.from(bias);
      for (let i = 0; i < values.length; i++) {
        const value = values[i];
        if (value === 0) continue; // about half of what comes out of a ReLU
        const row = (first + i) * outputs;
        for (let o = 0; o < outputs; o++) sums[o] += value * weights[row + o];
      }
      const last = number === this.layers.length - 1;
      for (let o = 0; o < outputs; o++) {
        sums[o] = last ? 1 / (1 + Math.exp(-sums[o])) : Math.max(0, sums[o]);
      }
      values = sums;
      first = 0;
    });
    return values;
  }
}

class Encoder {
  constructor(facts, weights, classes, dimensions) {
    const next = reader(weights);
    Object.assign(this, facts, { classes, dimensions });
    const patch = this.kernel ** 2;
    const channels = this.types * this.primaryDimensions;
    this.conv1 = { weights: next(this.conv1Channels * patch), bias: next(this.conv1Channels) };
    const count = channels * this.conv1Channels * patch;
    this.primary = { weights: next(count), bias: next(channels) };
    const width = classes * dimensions;
    this.votesWeights = next(this.inputs * this.primaryDimensions * width);
    this.digitBias = next(width);
  }

  // A grey image of size × size pixels in [0, 1] to the class capsules (J · D numbers).
  encode(pixels, size) {
    const image = padded(pixels, 1, size, this.conv1Pads, this.seen);
    const maps = convolve(image, 1, this.kernel, 1, this.conv1);
    for (let n = 0; n < maps.values.length; n++) {
      const bias = this.conv1.bias[Math.floor(n / maps.size ** 2)];
      maps.values[n] = Math.max(0, maps.values[n] + bias);
    }
    // The zeros around the second convolution's input are zeros after the ReLU too.
    const input = padded(maps.values, this.conv1Channels, maps.size, this.primaryPads);
    const primary = convolve(input, this.conv1Channels, this.kernel, 2, this.primary);
    return this.route(this.votes(this.poses(primary)));
  }

  // PrimaryCaps outputs u: input capsules in the order (type, row, column), K numbers each.
  poses({ values, size }) {
    const K = this.primaryDimensions;
    const places = size * size;
    const poses = new Float32Array(this.types * places * K);
    for (let type = 0; type < this.types; type++) {
      for (let place = 0; place < places; place++) {
        const start = (type * places + place) * K;
        for (let k = 0; k < K; k++) {
          const channel = type * K + k;
          const value = values[channel * places + place];
          poses[start + k] = value * this.scale + this.primary.bias[channel];
        }
        squash(poses, start, K);
      }
    }
    return poses;
  }

  // Eq. 2: û_j|i = W_ij u_i, as I · J · D numbers.
  votes(poses) {
    const K = this.primaryDimensions;
    const width = this.classes * this.dimensions;
    const votes = new Float32Array((poses.length / K) * width);
    for (let ik = 0; ik < poses.length; ik++) {
      const start = Math.floor(ik / K) * width;
      for (let n = 0; n < width; n++) {
        votes[start + n] += poses[ik] * this.votesWeights[ik * width + n];
      }
    }
    return votes;
  }

  // Procedure 1: routing by agreement.
  route(votes) {
    const J = this.classes;
    const D = this.dimensions;
    const inputs = votes.length / (J * D);
    const logits = new Float32Array(inputs * J);
    const capsules = new Float32Array(J * D);
    for (let iteration = 1; iteration <= this.iterations; iteration++) {
      capsules.set(this.digitBias);
      for (let i = 0; i < inputs; i++) {
        const shares = this.couplings(logits.subarray(i * J, (i + 1) * J));
        for (let n = 0; n < J * D; n++) {
          capsules[n] += shares[Math.floor(n / D)] * votes[i * J * D + n];
        }
      }
      for (let j = 0; j < J; j++) squash(capsules, j * D, D);
      if (iteration === this.iterations) break;
      for (let n = 0; n < votes.length; n++) {
        logits[Math.floor(n / D)] += votes[n] * capsules[n % (J * D)];
      }
    }
    return capsules;
  }

  // Eq. 3: a softmax; leaky routing adds a zero logit for "none of these".
  couplings(logits) {
    let largest = this.leaky ? 0 : -Infinity;
    for (const logit of logits) largest = Math.max(largest, logit);
    const shares = logits.map((logit) => Math.exp(logit - largest));
    let sum = this.leaky ? Math.exp(-largest) : 0;
    for (const share of shares) sum += share;
    return shares.map((share) => share / sum);
  }
}

// The first `kept` rows and columns of maps with zeros around them: so many before and after.
function padded(values, channels, size, [before, after], kept = size) {
  const side = kept + before + after;
  const wide = new Float32Array(channels * side * side);
  for (let channel = 0; channel < channels; channel++) {
    for (let row = 0; row < kept; row++) {
      const from = (channel * size + row) * size;
      wide.set(values.subarray(from, from + kept), (channel * side + row + before) * side + before);
    }
  }
  return { values: wide, size: side };
}

// A convolution without its bias; weights in the order (out, in, row, column).
function convolve({ values, size }, channels, kernel, stride, { weights, bias }) {
  const side = Math.floor((size - kernel) / stride) + 1;
  const outputs = bias.length;
  const width = channels * kernel * kernel;
  const result = new Float32Array(outputs * side * side);
  const patch = new Float32Array(width);
  for (let row = 0; row < side; row++) {
    for (let column = 0; column < side; column++) {
      let place = 0;
      for (let channel = 0; channel < channels; channel++) {
        for (let y = 0; y < kernel; y++) {
          const from = (channel * size + row * stride + y) * size + column * stride;
          for (let x = 0; x < kernel; x++) patch[place++] = values[from + x];
        }
      }
      for (let output = 0; output < outputs; output++) {
        const start = output * width;
        let sum = 0;
        for (let n = 0; n < width; n++) sum += patch[n] * weights[start + n];
        result[(output * side + row) * side + column] = sum;
      }
    }
  }
  return { values: result, size: side };
}
