// The capsules of PrimaryCaps, their votes, and routing by agreement on a CPU, forward and backward, in
// float32.
//
// Votes are never written to memory: wherever one is needed it is computed again from the weights,
// K multiplications that cost less than reading it would. Images are routed in groups of LANES, one
// image in each lane of a vector register, so that no sum over a capsule's dimensions crosses lanes.
//
// Sizes, as in routing.py: B batch, I input capsules, J output capsules, K input dimension,
// D output dimension; R iterations, G = ceil(B / LANES) groups, N = J * D. K, J and D are given to
// the compiler. A `vec` is one number for each image of a group. Arrays with a G hold
// [G][...][LANES]; all others are plain row-major tensors.
//
// Notation: s and v as in Procedure 1; c couplings, b logits; dx is the gradient of the loss with
// respect to x.

#include <math.h>
#include <stdlib.h>

#include "vectors.h"

typedef int int_vec __attribute__((vector_size(LANES * sizeof(int))));

enum { N = J * D };

static inline vec splat(float x) { return x - (vec){}; }
static inline vec larger(vec a, vec b) { return a > b ? a : b; }

// As squash in routing.py: a larger number's square, summed over a capsule, could be infinite.
static inline vec bounded(vec x) {
  const vec most = splat(2e17f);
  x = x > most ? most : x;  // written so that NaN stays NaN
  return x < -most ? -most : x;
}

static inline float bound(float x) { return x > 2e17f ? 2e17f : x < -2e17f ? -2e17f : x; }

static inline vec square_root(vec x) {
  vec y;
  for (int lane = 0; lane < LANES; lane++) y[lane] = sqrtf(x[lane]);
  return y;
}

// e^x for x <= 0, to 2e-7 of its value: 2^n e^r with |r| <= ln(2) / 2 and a minimax polynomial
// (Cephes expf).
static inline vec exponential(vec x) {
  x = x < -87.0f ? splat(-87.0f) : x;           // written so that NaN stays NaN
  const vec round = splat(12582912.0f);         // adding 1.5 * 2^23 rounds to an integer
  vec n = (x * 1.44269504f + round) - round;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int_vec power = (__builtin_convertvector(n, int_vec) + 127) << 23;
  return p * (vec)power;
}

static inline vec *allocate(size_t vectors) {
  return (vec *)aligned_alloc(64, (vectors * sizeof(vec) + 63) / 64 * 64);
}

// Copy `width` numbers of each image, `stride` apart from image to image, into lanes, and back.
// LANES numbers at a time: the images' rows often share their few lines of the cache.
static void pack(const float *rows, size_t stride, int images, size_t width, vec *packed) {
  for (size_t n = 0; n < width; n += LANES) {
    size_t count = width - n < LANES ? width - n : LANES;
    vec block[LANES] = {};
    for (int lane = 0; lane < images; lane++) {
      if (count == LANES) block[lane] = load(rows + lane * stride + n);
      else memcpy(block + lane, rows + lane * stride + n, count * sizeof(float));
    }
    transpose(block);
    for (size_t i = 0; i < count; i++) packed[n + i] = block[i];
  }
}

static void unpack(const vec *packed, size_t stride, int images, size_t width, float *rows) {
  for (size_t n = 0; n < width; n += LANES) {
    size_t count = width - n < LANES ? width - n : LANES;
    vec block[LANES] = {};
    for (size_t i = 0; i < count; i++) block[i] = packed[n + i];
    transpose(block);
    for (int lane = 0; lane < images; lane++) {
      if (count == LANES) memcpy(rows + lane * stride + n, block + lane, sizeof(vec));
      else memcpy(rows + lane * stride + n, block + lane, count * sizeof(float));
    }
  }
}

// v = s |s| / (1 + |s|²)
static inline void squash(const vec *s, vec *v) {
  for (int j = 0; j < J; j++, s += D, v += D) {
    vec square = {};
    for (int d = 0; d < D; d++) square += s[d] * s[d];
    vec factor = square_root(square) / (1.0f + square);
    for (int d = 0; d < D; d++) v[d] = s[d] * factor;
  }
}

// ds = dv |s| / (1 + |s|²) + s (s·dv) (1 - |s|²) / (|s| (1 + |s|²)²), which is 0 at s = 0
static inline void squash_backward(const vec *s, const vec *dv, vec *ds) {
  for (int j = 0; j < J; j++, s += D, dv += D, ds += D) {
    vec square = {}, product = {};
    for (int d = 0; d < D; d++) {
      square += s[d] * s[d];
      product += s[d] * dv[d];
    }
    vec norm = square_root(square), below = 1.0f + square;
    vec along = product * (1.0f - square) / ((norm == 0.0f ? splat(1.0f) : norm) * below * below);
    along = square > 1e8f ? -product / norm / below : along;  // the same there, without overflow
    for (int d = 0; d < D; d++) ds[d] = dv[d] * norm / below + s[d] * along;
  }
}

// One number of the votes of one input capsule, Eq. 2.
static inline vec vote(const vec *u, const float *weights, int n) {
  vec sum = u[0] * weights[n];
  for (int k = 1; k < K; k++) sum += u[k] * weights[k * N + n];
  return sum;
}

// The votes of one input capsule, and products[j] = sum over d of votes[j][d] * vectors[j][d].
static inline void votes_and_products(const vec *u, const float *weights, const vec *vectors, vec *votes,
                                      vec *products) {
  vec mine[K];
  for (int k = 0; k < K; k++) mine[k] = u[k];
  for (int j = 0; j < J; j++) {
    vec sum = {};
    for (int n = j * D; n < (j + 1) * D; n++) {
      votes[n] = vote(mine, weights, n);
      sum += votes[n] * vectors[n];
    }
    products[j] = sum;
  }
}

// sums[j][d] += factors[j] * votes[j][d]
static inline void add_weighted(const vec *votes, const vec *factors, vec *sums) {
  for (int j = 0; j < J; j++)
    for (int d = 0; d < D; d++) sums[j * D + d] += factors[j] * votes[j * D + d];
}

static inline void softmax(const vec *b, int leaky, vec *c) {
  vec highest = leaky ? (vec){} : b[0];
  for (int j = 0; j < J; j++) highest = larger(b[j], highest);
  vec total = leaky ? exponential(-highest) : (vec){};
  for (int j = 0; j < J; j++) total += c[j] = exponential(b[j] - highest);
  vec share = 1.0f / total;
  for (int j = 0; j < J; j++) c[j] *= share;
}

// The input capsules u [B][T][P][K] = squash(maps [B][P][T][K] * scale + bias [T][K]) of P places.
extern "C" void poses_forward(const float *maps, const float *bias, float scale, int B, int P, int T,
                              int threads, float *u) {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int image = 0; image < B; image++)
    for (int place = 0; place < P; place++)
      for (int t = 0; t < T; t++) {
        const float *from = maps + (((size_t)image * P + place) * T + t) * K;
        float *to = u + (((size_t)image * T + t) * P + place) * K;
        float s[K], square = 0;
        for (int k = 0; k < K; k++) s[k] = bound(from[k] * scale + bias[t * K + k]);
        for (int k = 0; k < K; k++) square += s[k] * s[k];
        float factor = sqrtf(square) / (1 + square);
        for (int k = 0; k < K; k++) to[k] = s[k] * factor;
      }
}

// From du to dmaps, see squash_backward.
extern "C" void poses_backward(const float *maps, const float *bias, float scale, const float *du,
                               int B, int P, int T, int threads, float *dmaps) {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
  for (int image = 0; image < B; image++)
    for (int place = 0; place < P; place++)
      for (int t = 0; t < T; t++) {
        size_t at = (((size_t)image * P + place) * T + t) * K;
        const float *from = du + (((size_t)image * T + t) * P + place) * K;
        float s[K], square = 0, product = 0;
        for (int k = 0; k < K; k++) s[k] = bound(maps[at + k] * scale + bias[t * K + k]);
        for (int k = 0; k < K; k++) square += s[k] * s[k];
        for (int k = 0; k < K; k++) product += s[k] * from[k];
        float norm = sqrtf(square), below = 1 + square;
        float along = product * (1 - square) / ((norm == 0 ? 1 : norm) * below * below);
        if (square > 1e8f) along = -product / norm / below;
        for (int k = 0; k < K; k++) dmaps[at + k] = (from[k] * norm / below + s[k] * along) * scale;
      }
}

extern "C" int lanes() { return LANES; }

// Inputs: u [B][I][K], weights [I][K][J][D], bias [J][D] or null.
// Outputs: v [B][J][D]; and, for the backward pass or null, s of every iteration, sums [B][R][J][D],
// and c of every iteration but the first, whose couplings are all equal, couplings [G][R-1][I][J].
extern "C" void route_forward(const float *u, const float *weights, const float *bias, int B, int I,
                              int R, int leaky, int threads, float *v, float *sums,
                              float *couplings) {
  int groups = (B + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int g = 0; g < groups; g++) {
    size_t first = (size_t)g * LANES;
    int images = B - first < LANES ? B - first : LANES;
    vec *inputs = allocate((size_t)I * K), *logits = allocate((size_t)I * J);
    vec s[N], capsules[N], votes[N], b[J], c[J];
    pack(u + first * I * K, (size_t)I * K, images, (size_t)I * K, inputs);
    for (int r = 0; r < R; r++) {
      vec *kept = couplings && r ? (vec *)couplings + ((size_t)g * (R - 1) + r - 1) * I * J : 0;
      for (int n = 0; n < N; n++) s[n] = (vec){};
      for (int i = 0; i < I; i++) {
        const vec *mine = inputs + (size_t)i * K;
        const float *matrix = weights + (size_t)i * K * N;
        if (r == 0) {
          for (int n = 0; n < N; n++) s[n] += vote(mine, matrix, n);
          continue;
        }
        votes_and_products(mine, matrix, capsules, votes, b);
        for (int j = 0; j < J; j++) {
          if (r > 1) b[j] += logits[i * J + j];
          logits[i * J + j] = b[j];
        }
        softmax(b, leaky, c);
        if (kept) memcpy(kept + (size_t)i * J, c, sizeof c);
        add_weighted(votes, c, s);
      }
      for (int n = 0; n < N; n++) {
        if (r == 0) s[n] /= (float)(J + leaky);  // equal shares; with `leaky` one goes to no one
        if (bias) s[n] += bias[n];
        s[n] = bounded(s[n]);
      }
      squash(s, capsules);
      if (sums) unpack(s, (size_t)R * N, images, N, sums + (first * R + r) * N);
    }
    unpack(capsules, N, images, N, v + first * N);
    free(inputs);
    free(logits);
  }
}

// The gradient of a vote is a sum of 2R - 1 products of a number and a vector,
//   dvotes[i][j][d] = ds_0[j][d] / J + sum over r = 1 … R-1 of
//                     c_r[i][j] ds_r[j][d] + db_r[i][j] v_(r-1)[j][d],
// so these are all that is kept of it: the vectors in `terms` [B][2R-1][J][D] (first ds_0 / J, then
// each ds_r, then each v_(r-1)), and db of every iteration but the first in `dlogits` (as couplings).
//
// Inputs: those of the forward pass, what it kept, and dv [B][J][D].
// Outputs: du, dweights, dsums [B][R][J][D]; terms, with room for LANES more, and dlogits are working
// space.
extern "C" void route_backward(const float *u, const float *weights, const float *sums,
                               const float *couplings, const float *dv, int B, int I, int R,
                               int leaky, int threads, float *dlogits, float *terms, float *du,
                               float *dweights, float *dsums) {
  int groups = (B + LANES - 1) / LANES, count = 2 * R - 1;
  // First the gradients of each image, a group of them at a time.
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int g = 0; g < groups; g++) {
    size_t first = (size_t)g * LANES;
    int images = B - first < LANES ? B - first : LANES;
    vec *inputs = allocate((size_t)I * K), *dinputs = allocate((size_t)I * K);
    vec *vectors = allocate((size_t)count * N);
    vec s[N], dcapsules[N], votes[N], db[J];
    const vec *group_c = (const vec *)couplings + (size_t)g * (R - 1) * I * J;
    vec *group_db = (vec *)dlogits + (size_t)g * (R - 1) * I * J;
    pack(u + first * I * K, (size_t)I * K, images, (size_t)I * K, inputs);
    pack(dv + first * N, N, images, N, dcapsules);
    for (int r = R - 1; r >= 0; r--) {
      vec *ds = vectors + (size_t)r * N;
      pack(sums + (first * R + r) * N, (size_t)R * N, images, N, s);
      squash_backward(s, dcapsules, ds);
      unpack(ds, (size_t)R * N, images, N, dsums + (first * R + r) * N);
      if (r == 0) {
        for (int n = 0; n < N; n++) ds[n] /= (float)(J + leaky);
        break;
      }
      const vec *c = group_c + (size_t)(r - 1) * I * J;
      vec *my_db = group_db + (size_t)(r - 1) * I * J;
      const vec *later_db = r < R - 1 ? my_db + (size_t)I * J : 0;
      for (int n = 0; n < N; n++) dcapsules[n] = (vec){};
      for (int i = 0; i < I; i++, c += J) {
        // Of the products with ds, which are dc, those of the logits' gradients are made.
        votes_and_products(inputs + (size_t)i * K, weights + (size_t)i * K * N, ds, votes, db);
        vec mean = {};
        for (int j = 0; j < J; j++) mean += c[j] * db[j];
        for (int j = 0; j < J; j++) {
          db[j] = c[j] * (db[j] - mean);
          if (later_db) db[j] += later_db[i * J + j];
          my_db[i * J + j] = db[j];
        }
        add_weighted(votes, db, dcapsules);
      }
      pack(sums + (first * R + r - 1) * N, (size_t)R * N, images, N, s);
      squash(s, vectors + (size_t)(R - 1 + r) * N);
    }
    for (int i = 0; i < I; i++) {
      const float *mine = weights + (size_t)i * K * N;
      vec sum[K] = {};
      for (int j = 0; j < J; j++) {
        vec dvotes[D];
        for (int d = 0; d < D; d++) dvotes[d] = vectors[j * D + d];
        for (int r = 1; r < R; r++) {
          const vec *ds = vectors + r * N + j * D, *before = ds + (R - 1) * N;
          size_t at = ((size_t)(r - 1) * I + i) * J + j;
          for (int d = 0; d < D; d++) dvotes[d] += group_c[at] * ds[d] + group_db[at] * before[d];
        }
        for (int d = 0; d < D; d++)
          for (int k = 0; k < K; k++) sum[k] += dvotes[d] * mine[k * N + j * D + d];
      }
      memcpy(dinputs + (size_t)i * K, sum, sizeof sum);
    }
    unpack(dinputs, (size_t)I * K, images, (size_t)I * K, du + first * I * K);
    unpack(vectors, (size_t)count * N, images, (size_t)count * N, terms + first * count * N);
    free(inputs);
    free(dinputs);
    free(vectors);
  }
  // Then the gradient of the weights, a sum over images that stays in registers, with D in their
  // lanes; `terms` for one j and all images stay in the cache while some input capsules pass.
  enum { CHUNK = 16 };
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int first = 0; first < I; first += CHUNK)
    for (int j = 0; j < J; j++)
      for (int d = 0; d < D; d += LANES)
        for (int i = first; i < first + CHUNK && i < I; i++) {
          vec sum[K] = {};
          for (int image = 0; image < B; image++) {
            const float *vectors = terms + (size_t)image * count * N + j * D + d;
            vec dvotes = load(vectors);
            for (int r = 1; r < R; r++) {
              size_t row = ((size_t)(image / LANES) * (R - 1) + r - 1) * I + i;
              size_t at = (row * J + j) * LANES + image % LANES;
              dvotes += couplings[at] * load(vectors + r * N);
              dvotes += dlogits[at] * load(vectors + (R - 1 + r) * N);
            }
            const float *inputs = u + ((size_t)image * I + i) * K;
            for (int k = 0; k < K; k++) sum[k] += inputs[k] * dvotes;
          }
          size_t width = D - d < LANES ? D - d : LANES;
          for (int k = 0; k < K; k++)
            memcpy(dweights + ((size_t)i * K + k) * N + j * D + d, sum + k, width * sizeof(float));
        }
}
