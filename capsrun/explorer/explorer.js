"use strict";
// What can be chosen, moved and seen. All of it follows from `state`, which `render` shows.

const facts = JSON.parse(document.getElementById("facts").textContent);
const J = facts.classNames.length;
const D = facts.dimensions;
const pixelCount = facts.channels * facts.px ** 2;
const decoder = new Decoder(facts.decoder, halvesOf("decoder"), D);
const encoder = facts.encoder && new Encoder(facts.encoder, halvesOf("encoder"), J, D);

const LIMIT = 0.5; // how far a slider moves a dimension
const SWEEP = [-0.25, -0.2, -0.15, -0.1, -0.05, 0, 0.05, 0.1, 0.15, 0.2, 0.25]; // figure 4
const SECONDS = 4; // of one swing of the animation
const SWING = 0.25;
const CLAIMED = 0.3; // a pixel at least so bright in a reconstruction is that digit's
const FRAME_MS = 8; // work on the sweep in one frame: the rest of it is for the browser
const SURE = 0.5; // a drawing of which no capsule is so long is not of a class for sure
const PAD_PX = 20; // MNIST's digits fit into so many pixels

const element = (id) => document.getElementById(id);
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
const number = (value) => value.toFixed(2).replace("-", "−");
const within = (least, value, most) => Math.max(least, Math.min(most, value));

// An element with these properties (`onclick`, …), attributes and children.
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// ---------------------------------------------------------------- the images

const storedPixels = bytesOf("pixels");
const storedCapsules = floatsOf("capsules");

// The digits that a test image consists of, and its capsules.
function storedImage(n) {
  const targets = Array.from({ length: facts.digits }, (_, t) => {
    const start = (n * facts.digits + t) * pixelCount;
    return Float32Array.from(storedPixels.subarray(start, start + pixelCount), (b) => b / 255);
  });
  return {
    number: n,
    targets,
    pixels: together(targets),
    labels: facts.labels[n],
    predicted: facts.predicted[n],
    capsules: storedCapsules.subarray(n * J * D, (n + 1) * J * D),
  };
}

// pad: what the drawing area showed, for undo to bring back.
function drawnImage(pixels, pad = null) {
  const capsules = encoder.encode(pixels, facts.px);
  const lengths = classes().map((k) => lengthOf(capsules, k * D, D));
  const predicted = classes()
    .sort((a, b) => lengths[b] - lengths[a])
    .slice(0, facts.digits)
    .sort((a, b) => a - b);
  const sure = Math.min(...predicted.map((k) => lengths[k])) >= SURE;
  return { number: null, targets: null, pixels, labels: null, predicted, capsules, sure, pad };
}

const classes = () => facts.classNames.map((_, k) => k);
const names = (labels) => labels.map((label) => facts.classNames[label]).join(" and ");

// Digits on top of each other, as MultiMNIST adds and clips them.
function together(parts) {
  return Float32Array.from(parts[0], (_, n) =>
    Math.min(1, parts.reduce((sum, part) => sum + part[n], 0)),
  );
}

// ---------------------------------------------------------------- state, undo

const state = {
  image: null,
  shown: [], // the classes that are drawn, one for each digit of the image
  active: 0, // which of them the sliders move
  moves: null, // by how much each dimension of each class was moved (J · D)
};
let lastStored = 0; // the test image that was looked at last
const past = [];
const future = [];

const snapshot = () => ({ ...state, shown: [...state.shown], moves: state.moves.slice() });
const label = () => state.shown[state.active];

// To be called before a change that can be undone.
function remember() {
  past.push(snapshot());
  future.length = 0;
  say("");
}

function travel(from, to) {
  stopAnimation();
  if (from.length) {
    to.push(snapshot());
    Object.assign(state, from.pop());
    restorePad();
  }
  render();
}

function choose(image) {
  if (image.number !== null) lastStored = image.number;
  stopAnimation();
  if (state.image) remember();
  Object.assign(state, {
    image,
    shown: [...image.predicted],
    active: 0,
    moves: new Float32Array(J * D),
  });
  render();
}

function chooseClass(k) {
  const other = state.shown.indexOf(k);
  if (other === state.active) return;
  stopAnimation();
  remember();
  if (other >= 0) state.active = other;
  else state.shown[state.active] = k;
  render();
}

function move(dimension, value) {
  state.moves[label() * D + dimension] = within(-LIMIT, value, LIMIT);
}

function capsule(k) {
  const start = k * D;
  const { image, moves } = state;
  return Float32Array.from({ length: D }, (_, d) => image.capsules[start + d] + moves[start + d]);
}

// ---------------------------------------------------------------- pictures

// Makes a canvas width × height pixels large; brightness(x, y, c) is that of a colour, in [0, 1].
function paintWith(canvas, width, height, brightness) {
  const data = new ImageData(width, height);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let c = 0; c < 3; c++) data.data[at++] = 255 * brightness(x, y, c);
      data.data[at++] = 255;
    }
  }
  Object.assign(canvas, { width, height });
  canvas.getContext("2d").putImageData(data, 0, 0);
}

// Grey, colour, or two cameras side by side.
function paint(canvas, pixels) {
  const { px, channels } = facts;
  paintWith(canvas, channels === 2 ? 2 * px : px, px, (x, y, c) => {
    const channel = channels === 3 ? c : x < px ? 0 : 1;
    return pixels[(channel * px + y) * px + (x % px)];
  });
}

// Two digits, each in its colour, and white where both are.
function paintColours(canvas, parts) {
  const { px, colours } = facts;
  paintWith(canvas, px, px, (x, y, c) =>
    parts.reduce((sum, part, t) => sum + part[y * px + x] * colours[t][c], 0),
  );
}

// Which digit each pixel was assigned to: 1 the first, 2 the second, 3 both, 0 ink of neither.
function assignment(parts) {
  return Array.from(parts[0], (_, n) => {
    const bits = (parts[0][n] >= CLAIMED ? 1 : 0) + (parts[1][n] >= CLAIMED ? 2 : 0);
    return bits || (state.image.pixels[n] >= CLAIMED ? 0 : null);
  });
}

// Plain, striped, chequered and dotted, so that nobody needs to tell the colours apart.
const ZOOM = 8;
const PATTERNS = {
  1: () => true,
  2: (x, y) => (x + y) % 4 < 2,
  3: (x, y) => x % 4 < 2 === y % 4 < 2,
  0: (x, y) => x % 4 === 1 && y % 4 === 1,
};

function paintAssignment(canvas, claims) {
  const side = facts.px * ZOOM;
  const colours = { 1: facts.colours[0], 2: facts.colours[1], 3: [1, 1, 1], 0: [0.8, 0.8, 0.8] };
  paintWith(canvas, side, side, (x, y, c) => {
    const claim = claims[Math.floor(y / ZOOM) * facts.px + Math.floor(x / ZOOM)];
    return claim === null ? 0 : colours[claim][c] * (PATTERNS[claim](x, y) ? 1 : 0.35);
  });
}

const pictures = {};

function addPicture(name, caption) {
  const canvas = make("canvas", { width: facts.px, height: facts.px, role: "img" });
  const text = make("figcaption", {}, caption);
  element("pictures").append(make("figure", { id: `picture-${name}` }, canvas, text));
  pictures[name] = { canvas, text };
}

function show(name, caption, paintIt, what) {
  const { canvas, text } = pictures[name];
  paintIt(canvas, what);
  text.textContent = caption;
  canvas.setAttribute("aria-label", caption);
}

function renderPictures() {
  const drawn = state.shown.map((k) => decoder.draw(capsule(k), k));
  if (facts.digits === 1) {
    show("output", `Drawn from capsule ${names(state.shown)}`, paint, drawn[0]);
    return;
  }
  show("output", "Drawn from both capsules", paintColours, drawn);
  drawn.forEach((pixels, t) => {
    const caption = `${facts.classNames[state.shown[t]]}, ${t ? "blue" : "orange"}`;
    show(`part${t}`, caption, paint, pixels);
  });
  const claims = assignment(drawn);
  show("claims", "What each pixel was assigned to", paintAssignment, claims);
  element("claims").textContent = claimsText(claims);
}

function claimsText(claims) {
  const inked = claims.filter((claim) => claim !== null);
  const count = (kind) => inked.filter((claim) => claim === kind).length;
  const percent = (kind) => `${Math.round((100 * count(kind)) / (inked.length || 1))} %`;
  const [first, second] = state.shown.map((k) => facts.classNames[k]);
  return (
    `Of the ink: ${first} alone (orange, plain) ${percent(1)}, ${second} alone (blue, striped) ` +
    `${percent(2)}, both (white, chequered) ${percent(3)}, neither (grey, dotted) ${percent(0)}. ` +
    `A pixel is a digit's where its reconstruction is brighter than ${CLAIMED}.`
  );
}

function renderInput() {
  const { number: n, pixels, targets } = state.image;
  show("input", n === null ? "Input, drawn here" : "Input", paint, pixels);
  if (facts.digits === 1) return;
  pictures.digits.canvas.parentElement.hidden = !targets;
  if (targets) show("digits", "The digits that it is made of", paintColours, targets);
}

function subjectText() {
  const { number: n, labels, predicted } = state.image;
  if (n === null) {
    const looks = state.image.sure ? "looks like" : "not sure what it is, most like";
    return `Your drawing: ${looks} ${names(predicted)}.`;
  }
  const right = labels.every((k, t) => k === predicted[t]);
  const verdict = right ? "recognised" : `✗ taken for ${names(predicted)}`;
  return `Test image ${facts.numbers[n].toLocaleString("en")}: ${names(labels)}, ${verdict}.`;
}

// ---------------------------------------------------------------- bars and sliders

const bars = [];
const sliders = [];

function radio(name, value, onchange, attributes = {}) {
  return make("input", { type: "radio", name, value, onchange, ...attributes });
}

function addBars() {
  for (const k of classes()) {
    const input = radio("length", k, () => chooseClass(k));
    const name = make("span", { className: "name" });
    const bar = make("div", { className: "bar" });
    const own = make("div", { className: "own" }); // the length that the network gave it
    const value = make("span");
    const track = make("div", { className: "track" }, bar, own);
    const row = make("label", { title: facts.classNames[k] }, input, name, track, value);
    element("lengths").append(row);
    bars.push({ input, name, bar, own, value });
  }
}

function renderBars() {
  for (const k of classes()) {
    const length = lengthOf(capsule(k), 0, D);
    const place = state.shown.indexOf(k);
    const { input, name, bar, own, value } = bars[k];
    const isMoved = state.moves.subarray(k * D, (k + 1) * D).some((value) => value);
    const marks = place < 0 ? [] : facts.digits === 1 ? ["drawn"] : [["orange", "blue"][place]];
    if (isMoved) marks.push("moved");
    name.textContent = facts.classNames[k] + (marks.length ? ` (${marks.join(", ")})` : "");
    own.style.left = `${100 * lengthOf(state.image.capsules, k * D, D)}%`;
    name.className = `name ${facts.digits === 2 && place >= 0 ? ["first", "second"][place] : ""}`;
    bar.style.width = `${100 * Math.min(1, length)}%`;
    value.textContent = number(length);
    input.checked = place === state.active;
    input.setAttribute("aria-label", `class ${facts.classNames[k]}, length ${number(length)}`);
  }
}

function addSliders() {
  for (let d = 0; d < D; d++) {
    const about = { type: "button", "aria-label": `Animate dimension ${d}`, title: "Animate" };
    const play = make("button", { ...about, onclick: () => toggleAnimation(d) }, "▶");
    const input = make("input", { type: "range", min: -LIMIT, max: LIMIT, step: 0.01, value: 0 });
    input.setAttribute("aria-label", `Dimension ${d}, change`);
    const output = make("span", { className: "now" });
    const name = make("span", {}, String(d));
    const row = make("div", { className: "slider" }, name, input, output, play);
    let held = false; // one undo takes back one pull of the slider, wherever it went
    input.addEventListener("input", () => {
      stopAnimation();
      if (!held) remember();
      held = true;
      move(d, Number(input.value));
      render();
    });
    for (const begun of ["change", "pointerdown", "blur"]) {
      input.addEventListener(begun, () => (held = false));
    }
    input.addEventListener("keydown", (event) => (held &&= event.repeat));
    element("sliders").append(row);
    sliders.push({ row, input, output, play });
  }
}

function renderSliders() {
  const values = capsule(label());
  sliders.forEach(({ row, input, output, play }, d) => {
    const change = state.moves[label() * D + d];
    input.value = change;
    input.setAttribute("aria-valuetext", `${signed(change)}, now ${number(values[d])}`);
    output.textContent = `${signed(change)} → ${number(values[d])}`;
    row.classList.toggle("moved", Math.abs(change) > 1e-6);
    const playing = animation?.dimension === d;
    play.setAttribute("aria-pressed", String(playing));
    play.textContent = playing ? "■" : "▶";
  });
  const rounded = Array.from(values, (value) => Number(value.toPrecision(6)));
  element("vector").value = JSON.stringify(rounded);
}

// ---------------------------------------------------------------- animation

let animation = null; // { dimension, started, before }

function toggleAnimation(dimension) {
  const playing = animation?.dimension;
  stopAnimation();
  if (playing !== dimension) {
    const before = state.moves[label() * D + dimension];
    animation = { dimension, before, started: performance.now() };
    requestAnimationFrame(animate);
  }
  render();
}

function animate(now) {
  if (!animation) return;
  const phase = (2 * Math.PI * (now - animation.started)) / (1000 * SECONDS);
  move(animation.dimension, animation.before + SWING * Math.sin(phase));
  render();
  requestAnimationFrame(animate);
}

// It leaves the dimension where it was found, so there is nothing to undo.
function stopAnimation() {
  if (!animation) return;
  move(animation.dimension, animation.before);
  animation = null;
}

// ---------------------------------------------------------------- the sweep

const GAP = 4; // between pictures, half of it each picture's own, for its outline
const BLOCKS = 2; // beside each other where the screen is wide enough
const blocks = []; // { canvas, first: its first dimension, rows: how many it has }
let sweep = null; // the pictures that are still to be drawn
let sweepTimer = 0;

const cellWidth = facts.px * (facts.channels === 2 ? 2 : 1) + GAP;
const cellHeight = facts.px + GAP;

function prepareSweep() {
  const most = Math.ceil(D / BLOCKS);
  for (let first = 0; first < D; first += most) {
    const rows = Math.min(most, D - first);
    const canvas = make("canvas", {
      width: SWEEP.length * cellWidth,
      height: rows * cellHeight,
      role: "img",
      "aria-label": `Reconstructions with dimensions ${first} to ${first + rows - 1} moved`,
      onclick: (event) => takeCell(event, first, rows),
    });
    const columns = SWEEP.map((value) => make("span", {}, signed(value)));
    const names = Array.from({ length: rows }, (_, row) => make("span", {}, String(first + row)));
    element("sweep").append(
      make("div", { className: "block" },
        make("div", { className: "columns", "aria-hidden": "true" }, ...columns),
        make("div", { className: "rows", "aria-hidden": "true" }, ...names),
        canvas),
    );
    blocks.push({ canvas, first, rows });
  }
}

function* sweepCells() {
  const cell = document.createElement("canvas");
  for (const { canvas, first, rows } of blocks) {
    const context = canvas.getContext("2d");
    for (let row = 0; row < rows; row++) {
      const d = first + row;
      const moved = capsule(label());
      const start = state.image.capsules[label() * D + d];
      const far = SWEEP.map((value) => Math.abs(value - state.moves[label() * D + d]));
      const nearest = far.indexOf(Math.min(...far));
      const top = row * cellHeight;
      context.clearRect(0, top, canvas.width, cellHeight);
      context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
      context.fillRect(nearest * cellWidth, top, cellWidth, cellHeight); // its outline
      for (let n = 0; n < SWEEP.length; n++) {
        moved[d] = start + SWEEP[n];
        paint(cell, decoder.draw(moved, label()));
        context.drawImage(cell, n * cellWidth + GAP / 2, top + GAP / 2);
        yield;
      }
    }
  }
}

// While something moves, the sweep waits: the large picture comes first.
function scheduleSweep() {
  sweep = null;
  element("sweep").dataset.done = "false";
  clearTimeout(sweepTimer);
  sweepTimer = setTimeout(() => {
    sweep = sweepCells();
    requestAnimationFrame(continueSweep);
  }, 120);
}

function continueSweep() {
  const began = performance.now();
  while (sweep && performance.now() - began < FRAME_MS) {
    if (!sweep.next().done) continue;
    sweep = null;
    element("sweep").dataset.done = "true";
  }
  if (sweep) requestAnimationFrame(continueSweep);
}

function takeCell(event, first, rows) {
  const box = event.target.getBoundingClientRect();
  const column = Math.floor(((event.clientX - box.left) / box.width) * SWEEP.length);
  const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
  stopAnimation();
  remember();
  move(first + within(0, row, rows - 1), SWEEP[within(0, column, SWEEP.length - 1)]);
  render();
}

// ---------------------------------------------------------------- everything at once

const times = [];

function render() {
  const began = performance.now();
  renderInput();
  renderPictures();
  renderBars();
  renderSliders();
  renderChoice();
  times.push(performance.now() - began);
  if (times.length > 30) times.shift();
  const typical = [...times].sort((a, b) => a - b)[Math.floor(times.length / 2)];
  // The first few are slow: the browser has not yet compiled what they need.
  if (times.length > 5) element("speed").textContent = `, ${typical.toFixed(1)} ms for a picture`;
  scheduleSweep();
}

function renderChoice() {
  const text = subjectText();
  if (element("subject").textContent !== text) element("subject").textContent = text;
  element("undo").disabled = !past.length;
  element("redo").disabled = !future.length;
  element("reset").disabled = !state.moves.some((value) => value) && !animation;
  element("animate").setAttribute("aria-pressed", String(Boolean(animation)));
  element("animate").textContent = animation ? "Stop" : "Animate";
  const { number: n, labels } = state.image;
  // Undo may have led to an image of another class.
  if (n !== null && !element("images").querySelector(`[value="${n}"]`)) listClass(labels[0]);
  for (const input of element("images").querySelectorAll("input")) {
    input.checked = Number(input.value) === n;
  }
  // A drawing is of none of these classes.
  const chosen = element("classes").querySelector("input:checked");
  if (n === null && chosen) chosen.checked = false;
  for (const input of element("which").querySelectorAll("input")) {
    const t = Number(input.value);
    input.checked = t === state.active;
    input.nextSibling.textContent = `${["orange", "blue"][t]}: ${facts.classNames[state.shown[t]]}`;
  }
}

// ---------------------------------------------------------------- choosing images

function addClasses() {
  for (const k of classes()) {
    const disabled = !imagesOf(k).length;
    const input = radio("class", k, () => openClass(k), { disabled });
    element("classes").append(make("label", {}, input, facts.classNames[k]));
  }
}

const imagesOf = (k) => facts.labels.flatMap((labels, n) => (labels.includes(k) ? [n] : []));

function openClass(k) {
  const members = imagesOf(k);
  if (!members.length) return say(`There is no test image of ${facts.classNames[k]} in this page.`);
  listClass(k);
  choose(storedImage(members[0]));
}

function listClass(k) {
  element("classes").querySelector(`[value="${k}"]`).checked = true;
  element("images-legend").textContent = `Test images of ${facts.classNames[k]}`;
  element("images").replaceChildren(...imagesOf(k).map(thumbnail));
}

function thumbnail(n) {
  const image = storedImage(n);
  const wrong = image.labels.some((k, t) => k !== image.predicted[t]);
  const text = `test image ${facts.numbers[n]}: ${names(image.labels)}` +
    (wrong ? `, taken for ${names(image.predicted)}` : "");
  const input = radio("image", n, () => choose(storedImage(n)), { "aria-label": text });
  const canvas = make("canvas", { "aria-hidden": "true" });
  paint(canvas, image.pixels);
  const mark = wrong ? [make("span", { className: "wrong", "aria-hidden": "true" }, "✗")] : [];
  return make("label", { title: text }, input, canvas, ...mark);
}

function step(by) {
  const inputs = [...element("images").querySelectorAll("input")];
  if (!inputs.length) return;
  const checked = inputs.findIndex((input) => input.checked);
  const at = checked < 0 && by < 0 ? 0 : checked;
  const next = inputs[(at + by + inputs.length) % inputs.length];
  next.parentElement.scrollIntoView({ block: "nearest" });
  choose(storedImage(Number(next.value)));
}

// ---------------------------------------------------------------- drawing

function addPad() {
  if (!encoder) {
    element("draw").hidden = true;
    element("no-draw").hidden = false;
    element("no-draw").textContent = `Digits cannot be drawn here: ${facts.note}.`;
    return;
  }
  if (facts.digits === 2) element("draw-title").textContent = "Or draw two that overlap";
  // Of two digits nobody knows which is to be where.
  element("centre").checked = facts.digits === 1;
  element("centre-label").hidden = facts.digits !== 1;
  const pad = element("pad");
  const context = pad.getContext("2d", { willReadFrequently: true });
  context.lineCap = context.lineJoin = "round";
  context.strokeStyle = "#fff";
  // In an MNIST digit lines are about 2 of 20 pixels wide; a centred drawing is scaled to that.
  context.lineWidth = facts.digits === 1 ? 0.08 * pad.width : (2.2 * pad.width) / facts.px;
  let last = null;
  const pen = { x: pad.width / 2, y: pad.height / 2, down: false }; // of the keys
  const place = (event) => {
    const box = pad.getBoundingClientRect();
    const zoom = pad.width / box.width;
    return [(event.clientX - box.left) * zoom, (event.clientY - box.top) * zoom];
  };
  pad.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !event.isPrimary) return;
    pad.setPointerCapture(event.pointerId);
    last = place(event);
    stroke(context, last, last);
  });
  pad.addEventListener("pointermove", (event) => {
    if (!last || !event.isPrimary) return;
    const here = place(event);
    stroke(context, last, here);
    last = here;
  });
  const lift = () => {
    if (last) readPad(context);
    last = null;
  };
  pad.addEventListener("pointerup", lift);
  pad.addEventListener("pointercancel", lift);
  pad.addEventListener("keydown", (event) => steer(event, context, pen));
  for (const name of ["focus", "blur"]) pad.addEventListener(name, () => showPen(pen, pad));
  element("centre").addEventListener("change", () => {
    if (state.image.number === null) readPad(context);
  });
  element("clear").addEventListener("click", () => {
    clearPad(context);
    if (state.image.number === null) choose(storedImage(lastStored));
  });
  clearPad(context);
}

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const STEP = 10; // of the pad's pixels

// Drawing with keys: arrows move the pen, the space bar puts it down and lifts it.
function steer(event, context, pen) {
  const direction = STEPS[event.key];
  if (!direction && event.key !== " ") return;
  event.preventDefault();
  event.stopPropagation();
  const before = [pen.x, pen.y];
  if (direction) {
    pen.x = within(0, pen.x + STEP * direction[0], context.canvas.width);
    pen.y = within(0, pen.y + STEP * direction[1], context.canvas.height);
  } else {
    pen.down = !pen.down;
  }
  if (pen.down) stroke(context, before, [pen.x, pen.y]);
  else if (!direction) readPad(context); // it was lifted
  showPen(pen, context.canvas);
}

function showPen(pen, pad) {
  const mark = element("pen");
  mark.hidden = document.activeElement !== pad || !pad.matches(":focus-visible");
  mark.style.left = `${(100 * pen.x) / pad.width}%`;
  mark.style.top = `${(100 * pen.y) / pad.height}%`;
  mark.classList.toggle("down", pen.down);
}

function restorePad() {
  if (!encoder) return;
  const context = element("pad").getContext("2d");
  if (state.image.pad) context.putImageData(state.image.pad, 0, 0);
  else clearPad(context);
}

function clearPad(context) {
  context.fillStyle = "#000";
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
}

function stroke(context, [x0, y0], [x1, y1]) {
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
  context.stroke();
}

function readPad(context) {
  const side = context.canvas.width;
  const bytes = context.getImageData(0, 0, side, side).data;
  const ink = Float32Array.from({ length: side * side }, (_, n) => bytes[4 * n] / 255);
  if (!ink.some((value) => value)) return;
  const asMnist = element("centre").checked;
  const pixels = asMnist ? centred(ink, side) : shrunk(ink, side, side / facts.px, 0, 0);
  choose(drawnImage(pixels, context.getImageData(0, 0, side, side)));
}

// As MNIST was made: fitted into 20 × 20 pixels, its centre of mass put into the middle.
function centred(ink, side) {
  let [left, right, top, bottom, mass, massX, massY] = [side, -1, side, -1, 0, 0, 0];
  ink.forEach((value, n) => {
    if (!value) return;
    const [x, y] = [n % side, Math.floor(n / side)];
    [left, right] = [Math.min(left, x), Math.max(right, x)];
    [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
    mass += value;
    massX += value * (x + 0.5);
    massY += value * (y + 0.5);
  });
  const scale = Math.max(right - left, bottom - top, 1) / PAD_PX;
  const half = (facts.px / 2) * scale;
  return shrunk(ink, side, scale, massX / mass - half, massY / mass - half);
}

// An image of which each pixel is the mean of the ink in a square of scale × scale.
function shrunk(ink, side, scale, left, top) {
  const SAMPLES = 6; // along each axis of that square
  const at = (start, pixel, sample) =>
    Math.floor(start + scale * (pixel + (sample + 0.5) / SAMPLES));
  return Float32Array.from({ length: facts.px ** 2 }, (_, n) => {
    let sum = 0;
    for (let sample = 0; sample < SAMPLES ** 2; sample++) {
      const x = at(left, n % facts.px, sample % SAMPLES);
      const y = at(top, Math.floor(n / facts.px), Math.floor(sample / SAMPLES));
      if (x >= 0 && x < side && y >= 0 && y < side) sum += ink[y * side + x];
    }
    return sum / SAMPLES ** 2;
  });
}

// ---------------------------------------------------------------- buttons and keys

function say(text) {
  element("said").textContent = text;
}

async function copyVector() {
  const text = element("vector").value;
  try {
    await navigator.clipboard.writeText(text);
    say(`Copied the ${D} numbers of the capsule.`);
  } catch {
    element("vector").select(); // not every browser lets a file write to the clipboard
    say("The vector is selected: copy it with Ctrl C.");
  }
}

function savePicture() {
  const source = pictures.output.canvas;
  const large = make("canvas", { width: source.width * ZOOM, height: source.height * ZOOM });
  const context = large.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(source, 0, 0, large.width, large.height);
  const name = `capsule-${state.shown.map((k) => facts.classNames[k]).join("-")}.png`;
  large.toBlob((blob) => {
    const link = make("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    say(`Saved ${name}.`);
  });
}

function reset() {
  stopAnimation();
  if (!state.moves.some((value) => value)) return render();
  remember();
  state.moves = new Float32Array(J * D);
  render();
}

// Without a dimension said, the one that was moved last or the first.
function animateAny() {
  const moved = sliders.findIndex(({ row }) => row.classList.contains("moved"));
  toggleAnimation(animation ? animation.dimension : Math.max(0, moved));
}

const KEYS = {
  a: animateAny,
  r: reset,
  z: () => travel(past, future),
  y: () => travel(future, past),
  c: copyVector,
  s: savePicture,
  "[": () => step(-1),
  "]": () => step(1),
};

function press(event) {
  const typing = event.target === element("vector");
  const key = event.key.toLowerCase();
  const control = event.ctrlKey || event.metaKey;
  if (control && key === "z") {
    event.preventDefault();
    KEYS[event.shiftKey ? "y" : "z"]();
  } else if (typing || control || event.altKey) return;
  else if (KEYS[key]) KEYS[key]();
  else if (/^\d$/.test(event.key) && Number(event.key) < J) openClass(Number(event.key));
}

function start() {
  addPicture("input", "Input");
  if (facts.digits === 2) addPicture("digits", "");
  addPicture("output", "");
  if (facts.digits === 2) {
    ["part0", "part1", "claims"].forEach((name) => addPicture(name, ""));
    element("pictures").classList.add("many");
    element("claims").hidden = element("which").hidden = false;
    for (const t of [0, 1]) {
      const input = radio("which", t, () => {
        stopAnimation();
        state.active = t;
        render();
      });
      const text = make("label", { className: ["first", "second"][t] }, input, "");
      element("which").lastElementChild.append(text);
    }
  }
  addClasses();
  addBars();
  addSliders();
  prepareSweep();
  addPad();
  const buttons = { animate: "a", undo: "z", redo: "y", reset: "r", copy: "c", save: "s" };
  for (const [id, key] of Object.entries(buttons)) element(id).onclick = KEYS[key];
  document.addEventListener("keydown", press);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", scheduleSweep);
  openClass(facts.labels[0][0]);
}

start();
