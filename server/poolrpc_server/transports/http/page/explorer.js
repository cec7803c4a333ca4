// The explorer: what the layers of this server do to a tensor, window by window. It speaks the JSON protocol alone; the
// layers, their parameters and the messages at them come from the server.
"use strict";

const $ = (id) => document.getElementById(id);
const MAX_CELLS = 256; // a plane with more cells is a picture
const IMAGE_PIXELS = 96; // the longer side of an image of one's own
const POLL_SECONDS = 2;
const DEBOUNCE_MS = 150;
const STAGES = ["receive", "queue", "compute", "send", "network"];

const state = {
  info: null, token: "", layers: [], result: null, explained: null, step: 0, plane: 0, index: 0, timer: 0, source: "plane",
  image: null, call: null, tab: "python", runs: 0,
};

// ---- The server ----

class CallError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.fields = error.fields ?? [];
    this.seconds = error.retry_seconds;
  }
}

/** Call the server: returns its answer, the stages of its time in milliseconds, and the whole time. */
async function call(path, body, signal) {
  const headers = state.token ? { Authorization: `Bearer ${state.token}` } : {};
  const began = performance.now();
  const response = await fetch(path, body === undefined ? { headers, signal } : { method: "POST", headers, body: JSON.stringify(body), signal });
  const answer = await response.json();
  if (!response.ok) throw new CallError(response.status, answer.error);
  const timing = Object.fromEntries([...(response.headers.get("Server-Timing") ?? "").matchAll(/(\w+);dur=([\d.]+)/g)].map((each) => [each[1], Number(each[2])]));
  return { answer, timing, total: performance.now() - began };
}

function setStatus(kind, text) {
  $("status").dataset.state = kind;
  if ($("status").textContent !== text) $("status").textContent = text;
}

function setBanner(text) {
  if ($("banner").textContent !== text) $("banner").textContent = text;
  $("banner").hidden = !text;
}

async function connect() {
  try {
    state.info = (await call("/v1/info")).answer;
  } catch (error) {
    if (error.status !== 401) return lost(error);
    setStatus("busy", "needs a token");
    if (state.token) setBanner("The server does not know this token.");
    $("token-form").hidden = false;
    return $("token").focus();
  }
  $("token-form").hidden = true;
  setBanner("");
  const { version, device, torch } = state.info;
  $("server").textContent = `version ${version}, torch ${torch}, on ${device}`;
  setStatus("up", "connected");
  if (!state.layers.length) start();
  else run();
}

function lost(error) {
  setStatus("down", "no answer");
  setBanner(error instanceof CallError ? `${error.message}. Trying again.` : "The server does not answer. It may be starting again; this page tries every 2 seconds.");
  state.down = true;
  stop();
}

async function poll() {
  if (!document.hidden) {
    try {
      if (state.down || !state.info) {
        if ($("token-form").hidden || state.down) {
          await call("/v1/load");
          state.down = false;
          await connect();
        }
      } else showLoad((await call("/v1/load")).answer);
    } catch (error) {
      if (error.status === 401 || error.status === 403) {
        state.down = false;
        if ($("token-form").hidden) await connect();
      } else if (!(error instanceof CallError)) lost(error);
    }
  }
  setTimeout(poll, POLL_SECONDS * 1000);
}

// ---- Tensors ----

const product = (sizes) => sizes.reduce((a, b) => a * b, 1);

function half(bits) {
  const [sign, exponent, fraction] = [bits & 0x8000 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
}

/** Return the numbers of a tensor in base64. */
function decode({ data, dtype }) {
  const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0)).buffer;
  switch (dtype) {
    case "float16": return Float64Array.from(new Uint16Array(bytes), half);
    case "bfloat16": return Float64Array.from(new Float32Array(Uint32Array.from(new Uint16Array(bytes), (each) => each << 16).buffer));
    case "int64": return Float64Array.from(new BigInt64Array(bytes), Number);
    default: {
      const types = { float32: Float32Array, float64: Float64Array, uint8: Uint8Array, bool: Uint8Array, uint16: Uint16Array, int8: Int8Array, int16: Int16Array, int32: Int32Array };
      return new types[dtype](bytes);
    }
  }
}

/** Return the position on each axis of the cell of a number. */
function unravel(number, shape) {
  const at = [];
  for (let axis = shape.length - 1, rest = number; axis >= 0; axis--) { at.unshift(rest % shape[axis]); rest = Math.floor(rest / shape[axis]); }
  return at;
}

/** Return numbers as nested lists. */
function nested(numbers, shape) {
  let values = Array.from(numbers, (each) => (Number.isFinite(each) ? each : String(each)));
  for (let axis = shape.length - 1; axis > 0; axis--) {
    const size = shape[axis];
    values = Array.from({ length: values.length / size }, (_, i) => values.slice(i * size, (i + 1) * size));
  }
  return values;
}

/** Return one plane of a tensor (C, spatial...) as { shape, values }; a plane alone has no C. */
function planeOf(tensor, dims, plane) {
  const shape = tensor.shape.slice(tensor.shape.length - dims);
  const size = product(shape);
  return { shape, values: tensor.values.subarray(plane * size, (plane + 1) * size) };
}

const planes = (tensor, dims) => product(tensor.shape.slice(0, tensor.shape.length - dims));

function text(value) {
  if (Number.isInteger(value)) return String(value);
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "inf" : "-inf";
  const digits = Number(value.toPrecision(4));
  return Math.abs(digits) >= 1e5 || Math.abs(digits) < 1e-3 ? digits.toExponential(1) : String(digits);
}

// ---- What to pool ----

const tensor = (shape, f) => ({ shape, values: Float32Array.from({ length: product(shape) }, (_, i) => f(...unravel(i, shape))) });

const SEVEN = [
  "............", "............", "..########..", "..########..", "........##..", ".......##...", "......##....", ".....###....",
  "....###.....", "....##......", "....##......", "............",
];

/** A landscape, drawn here: a sky, a sun, hills, and a field of stripes. */
function landscape(channel, y, x) {
  const sun = (x - 66) ** 2 + (y - 26) ** 2 < 110;
  const hill = y > 58 + 12 * Math.sin(x / 13) - x / 16;
  const field = y > 70 + 5 * Math.sin(x / 21 + 2);
  if (field) return [72, 130, 62][channel] + ((x + 3 * y) % 12 < 6 ? 34 : 0);
  if (hill) return [52, 74, 110][channel] + (y - 50) / 2;
  if (sun) return [255, 214, 102][channel];
  return [110 + y * 1.9, 160 + y * 1.1, 225 + y / 4][channel];
}

const SOURCES = {
  plane: { name: "A plane of 4 x 4 numbers", dims: 2, make: () => ({ shape: [4, 4], values: Float32Array.of(1, 3, 2, 4, 5, 6, 8, 7, 4, 2, 1, 0, 9, 7, 3, 2) }) },
  digit: { name: "A handwritten seven", dims: 2, make: () => tensor([12, 12], (y, x) => (SEVEN[y][x] === "#" ? 9 - ((x + y) % 3) : (x * y) % 5 === 0 ? 1 : 0)) },
  photo: { name: "A landscape, 3 channels", dims: 2, make: () => tensor([3, 96, 96], (c, y, x) => Math.min(255, Math.round(landscape(c, y, x)))) },
  signal: { name: "A signal, 1d", dims: 1, make: () => tensor([16], (x) => Math.round(9 * Math.sin(x / 2.2) + 4 * Math.cos(x * 1.9))) },
  volume: { name: "A volume, 3d", dims: 3, make: () => tensor([4, 6, 6], (z, y, x) => Math.round(9 * Math.exp(-((z - 1.5) ** 2 + (y - 2) ** 2 + (x - 3) ** 2) / 5))) },
  grid: { name: "Numbers that I type", dims: 0 },
  image: { name: "An image from this device", dims: 2 },
};

/** Return the typed numbers as a tensor, of (C, H, W) or of the layers' number of axes. */
function typed(dims) {
  const blocks = $("grid").value.trim().split(/\n\s*\n/).map((block) => block.split("\n").map((line) => line.trim().split(/[\s,;]+/).filter(Boolean)).filter((row) => row.length));
  const rows = blocks.flat();
  const wrong = rows.flat().find((each) => Number.isNaN(Number(each)) && each !== "nan" && each !== "NaN");
  if (!rows.length) throw new Error("expected numbers, got none");
  if (wrong !== undefined) throw new Error(`expected numbers, got ${wrong}`);
  const other = rows.find((row) => row.length !== rows[0].length);
  if (other) throw new Error(`expected rows of ${rows[0].length} numbers, as the first has, got one of ${other.length}`);
  if (blocks.some((block) => block.length !== blocks[0].length)) throw new Error("expected as many rows after each empty line");
  const shape = [blocks.length, blocks[0].length, rows[0].length];
  const axes = blocks.length > 1 || dims === 3 ? shape : rows.length > 1 || dims === 2 ? shape.slice(1) : shape.slice(2);
  return { shape: axes, values: Float64Array.from(rows.flat(), Number) };
}

async function readImage(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, IMAGE_PIXELS / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((each) => Math.max(1, Math.round(each * scale)));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height);
  return tensor([3, height, width], (c, y, x) => data[4 * (y * width + x) + c]);
}

/** Return the tensor in the form in which it is sent: lists of few numbers, else base64 of float32. */
function sent(input) {
  if (input.values.length <= MAX_CELLS) return nested(input.values, input.shape);
  const bytes = new Uint8Array(Float32Array.from(input.values).buffer);
  let binary = "";
  for (let at = 0; at < bytes.length; at += 8192) binary += String.fromCharCode(...bytes.subarray(at, at + 8192));
  return { data: btoa(binary), shape: input.shape, dtype: "float32" };
}

// ---- Layers and their parameters ----

const OPERANDS = {
  indices: "For each input cell, the number of the output cell that gets it, as MaxPool2d(2, return_indices=True) returns it.",
  weights: "A weight for each cell, such as a mask of 0 and 1.",
  offsets: "Where each segment begins, and the last one ends.",
  boxes: "Of each box: the number of the image (0), x1, y1, x2, y2.",
};

const layerInfo = (layer) => state.info.layers.find((each) => each.name === layer.name);
const dimsOf = (layers) => layers.map((each) => layerInfo(each).spatial_dims).find(Boolean) ?? SOURCES[state.source].dims;

/** Return a value of JSON for what a person types: 3; 3, 2; (3, 2); ((0, 1), (1, 1)); None; inf; max. */
function parse(typedText) {
  const words = typedText.trim().replace(/\(/g, "[").replace(/\)/g, "]").replace(/,\s*\]/g, "]").replace(/\bNone\b/g, "null").replace(/\bTrue\b/g, "true").replace(/\bFalse\b/g, "false").replace(/-?\binf(inity)?\b/gi, (each) => (each.startsWith("-") ? '"-Infinity"' : '"Infinity"'));
  for (const candidate of [words, `[${words}]`]) {
    try { return JSON.parse(candidate); } catch { /* the next form */ }
  }
  return typedText.trim();
}

function layerObject(layer) {
  const object = { name: layer.name };
  for (const parameter of layerInfo(layer).parameters) {
    const value = layer.values[parameter.name];
    if (parameter.kind === "boolean") { if (value !== parameter.default) object[parameter.name] = value; }
    else if (parameter.kind === "string") { if (value && value !== parameter.default) object[parameter.name] = value; }
    else if (value?.trim()) object[parameter.name] = parse(value);
  }
  return object;
}

const shown = (value) => (value === null ? "None" : Array.isArray(value) ? `(${value.map(shown).join(", ")})` : String(value));

function newLayer(name) {
  const info = state.info.layers.find((each) => each.name === name);
  const values = Object.fromEntries(info.parameters.map(({ name: parameter, kind, default: standard }) => {
    const example = info.example[parameter];
    return [parameter, kind === "boolean" ? example ?? standard : kind === "string" ? example ?? standard ?? "" : example === undefined ? "" : shown(example)];
  }));
  return { name, values };
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in made && typeof value !== "string") made[name] = value;
    else if (value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((each) => each !== null));
  return made;
}

const choose = (options, value) => options.map((each) => element("option", { value: each, selected: each === value }, each));

function parameterField(layer, i, parameter) {
  const { name, kind, choices, help, required } = parameter;
  const id = `layer-${i}-${name}`;
  const error = element("p", { class: "error", id: `${id}-error` });
  const hint = help ? element("span", { class: "sr", id: `${id}-help` }, help) : null;
  const described = { "aria-describedby": `${id}-error${help ? ` ${id}-help` : ""}` };
  const set = (value) => { layer.values[name] = value; changed(); };
  if (kind === "boolean") {
    const box = element("input", { type: "checkbox", id, checked: layer.values[name], ...described });
    box.addEventListener("change", () => set(box.checked));
    return element("div", { class: "field" }, element("label", { class: "check", title: help }, box, name), error, hint);
  }
  const label = element("label", { for: id, class: "label", title: help }, name);
  if (choices.length) {
    const select = element("select", { id, ...described }, ...(required ? [] : [element("option", { value: "" }, shown(parameter.default))]), ...choose(choices, layer.values[name]));
    select.addEventListener("change", () => set(select.value));
    return element("div", { class: "field" }, label, select, error, hint);
  }
  const input = element("input", { type: "text", id, spellcheck: "false", inputmode: "text", value: layer.values[name], placeholder: required ? "" : shown(parameter.default), "aria-required": String(required), ...described });
  input.addEventListener("input", () => set(input.value));
  if (!kind.startsWith("integer")) return element("div", { class: "field" }, label, input, error, hint);
  const add = (difference) => {
    const value = parse(input.value || shown(parameter.default ?? (name === "seed" ? 0 : 1)));
    const moved = Array.isArray(value) ? value.map((each) => (Number.isInteger(each) ? each + difference : each)) : Number.isInteger(value) ? value + difference : value;
    set(input.value = shown(moved));
  };
  input.addEventListener("keydown", (event) => {
    const difference = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (difference) { event.preventDefault(); add(difference); }
  });
  // For the mouse and for touch; the arrow keys do the same in the field.
  const [less, more] = [["\u2212", -1], ["+", 1]].map(([sign, difference]) => {
    const button = element("button", { type: "button", tabindex: "-1", "aria-hidden": "true" }, sign);
    button.addEventListener("click", () => add(difference));
    return button;
  });
  return element("div", { class: "field" }, label, element("div", { class: "stepper" }, less, input, more), error, hint);
}

/** Return an operand to begin with: one that fits the layer and the input. */
function exampleOperand(layer, given) {
  const { operand, spatial_dims: dims } = layerInfo(layer);
  const sizes = given.shape.slice(-dims);
  const [height, width] = sizes.slice(-2);
  switch (operand) {
    case "weights": return nested(Array.from({ length: product(sizes) }, (_, i) => Number(2 * i < product(sizes))), sizes);
    case "offsets": return [0, Math.ceil(sizes[0] / 4), Math.ceil(sizes[0] / 2), sizes[0]];
    case "boxes": return [[0, 0, 0, (width >> 1) - 1, (height >> 1) - 1], [0, width >> 2, height >> 2, width - 1, height - 1]];
    default: { // indices: a corner of each window of 2 cells a side, now the first, now the last one
      const place = (i) => unravel(i, sizes).reduce((flat, at, axis, all) => flat * 2 * sizes[axis] + 2 * at + (all.reduce((a, b) => a + b) % 2), 0);
      return nested(Array.from({ length: product(given.shape) }, (_, i) => place(i % product(sizes))), given.shape);
    }
  }
}

/** Return the operand of the first layer as { name, value }; null if there is none. It is an example until it is typed. */
function operandOf(given) {
  const layer = state.layers[0];
  const { operand: name, operand_optional: optional } = layerInfo(layer);
  if (!name) return null;
  const field = $(`layer-0-${name}`);
  const example = JSON.stringify(exampleOperand(layer, given)).replaceAll("],[", "],\n [").replaceAll(",", ", ").replaceAll(", \n", ",\n");
  if (layer.operand === undefined) field.value = optional ? "" : example;
  field.placeholder = example;
  return field.value.trim() ? { name, value: parse(field.value) } : null;
}

function operandField(layer, i, { operand, operand_optional: optional }) {
  const id = `layer-${i}-${operand}`;
  const area = element("textarea", { id, rows: 4, spellcheck: "false", value: layer.operand ?? "", "aria-describedby": `${id}-hint ${id}-error` });
  area.addEventListener("input", () => { layer.operand = area.value; changed(); });
  area.addEventListener("change", () => { if (!area.value.trim()) { delete layer.operand; changed(); } });
  const hint = `${OPERANDS[operand]}${optional ? " Empty: none." : ""}`;
  return element("div", { class: "field" }, element("label", { for: id, class: "label" }, operand), area, element("small", { id: `${id}-hint` }, hint), element("p", { class: "error", id: `${id}-error` }));
}

function layerCard(layer, i) {
  const info = layerInfo(layer);
  const groups = [[2, "2d"], [1, "1d"], [3, "3d"], [0, "Each cell by itself"]].map(([dims, label]) => {
    const names = state.info.layers.filter((each) => each.spatial_dims === dims).map((each) => each.name);
    return element("optgroup", { label }, ...choose(names, layer.name));
  });
  const select = element("select", { id: `layer-${i}-name`, "aria-label": `Layer ${i + 1}`, "aria-describedby": `layer-${i}-summary layer-${i}-error` }, ...groups);
  select.addEventListener("change", () => {
    state.layers[i] = newLayer(select.value);
    adaptTo(state.layers[i]);
    showLayers();
    $(select.id).focus();
    changed();
  });
  const move = (label, sign, to) => {
    const button = element("button", { type: "button", class: "quiet icon", "aria-label": `${label} layer ${i + 1}` }, sign);
    button.addEventListener("click", () => {
      const [moved] = state.layers.splice(i, 1);
      if (to !== null) state.layers.splice(to, 0, moved);
      showLayers();
      ($(`layer-${Math.max(0, to ?? i - 1)}-name`) ?? $("add")).focus();
      changed();
    });
    return button;
  };
  const several = state.layers.length > 1;
  const summary = element("p", { class: "summary", id: `layer-${i}-summary` }, info.summary);
  const card = element("li", { class: "layer" },
    element("div", { class: "layer-head" }, select, i ? move("Move up", "\u2191", i - 1) : null, several ? move("Remove", "\u00d7", null) : null),
    summary,
    element("p", { class: "error", id: `layer-${i}-error` }),
    info.parameters.length ? element("div", { class: "parameters" }, ...info.parameters.map((each) => parameterField(layer, i, each))) : null,
    info.operand && !i ? operandField(layer, i, info) : null);
  card.addEventListener("focusin", ({ target }) => {
    const parameter = info.parameters.find((each) => target.id === `layer-${i}-${each.name}`);
    summary.textContent = parameter?.help || info.summary; // in a box of one size: nothing moves under the mouse
  });
  return card;
}

/** Make the input and the other layers fit a layer that was chosen: all have the same number of axes. */
function adaptTo(layer) {
  const dims = layerInfo(layer).spatial_dims;
  if (!dims) return;
  state.layers = state.layers.filter((each) => each === layer || [0, dims].includes(layerInfo(each).spatial_dims));
  if (SOURCES[state.source].dims && SOURCES[state.source].dims !== dims) setSource({ 1: "signal", 2: "plane", 3: "volume" }[dims]);
}

function showLayers() {
  $("layers").replaceChildren(...state.layers.map(layerCard));
}

function setSource(name) {
  state.source = $("source").value = name;
  $("grid-field").hidden = name !== "grid";
  $("file-field").hidden = name !== "image";
}

// ---- A call ----

let waiting = 0;
function changed() {
  clearTimeout(waiting);
  waiting = setTimeout(run, DEBOUNCE_MS);
}

function input() {
  if (state.source === "grid") return typed(dimsOf(state.layers));
  if (state.source === "image") return state.image;
  return SOURCES[state.source].make();
}

async function run() {
  clearTimeout(waiting);
  state.call?.abort();
  const control = (state.call = new AbortController());
  clearErrors();
  $("stale").hidden = true;
  let request, given, operand;
  try {
    given = input();
    if (!given) return;
    const dtype = $("dtype").value;
    const value = dtype === "float32" || given.values.length <= MAX_CELLS ? sent(given) : nested(given.values, given.shape);
    request = { layer: state.layers.map(layerObject), input: value, dtype, steps: true, encoding: "base64" };
    const branches = $("branches").value.split("\n").map((each) => each.trim()).filter(Boolean);
    if (branches.length) request.branches = branches;
    operand = operandOf(given);
    if (operand) request[operand.name] = operand.value;
  } catch (error) {
    return fail("grid", error.message);
  }
  const before = state.layers;
  try {
    const { answer, timing, total } = await call("/v1/pool", request, control.signal);
    if (control.signal.aborted) return;
    const steps = answer.steps.map((each) => ({ ...each, values: decode(each.output), indices: each.indices ? decode(each.indices) : null }));
    const branches = [answer, ...answer.branches ?? []].map((each) => ({ ...each, values: decode(each.output) }));
    state.result = { input: { ...given, dtype: request.dtype }, steps, branches, operand, layer: answer.layer, dims: dimsOf(before), layers: before.map((each) => ({ ...each })), request };
    state.step = Math.min(state.step, steps.length - 1);
    state.tries = 0;
    $("stage").removeAttribute("data-stale");
    setStatus("up", "connected");
    if (!state.down) setBanner("");
    showTimes(timing, total);
    showCode();
    await showStep(control.signal);
    $("stage").dataset.run = ++state.runs;
  } catch (error) {
    if (error.name !== "AbortError") failed(error);
  }
}

function failed(error) {
  $("stage").dataset.stale = "";
  if (!(error instanceof CallError)) return lost(error);
  if (error.status === 401) return connect();
  if (error.status === 503) {
    state.tries = (state.tries ?? 0) + 1;
    const seconds = Math.min(5, Math.max(error.seconds ?? 0.1, 0.25 * 2 ** state.tries));
    setStatus("busy", "busy");
    setBanner(`The server is busy: ${error.message}. Trying again in ${seconds.toFixed(1)} s.`);
    clearTimeout(waiting);
    waiting = setTimeout(run, seconds * 1000);
    return;
  }
  const fields = error.fields.length ? error.fields : [{ field: error.message.match(/^layer\[\d+\]/)?.[0] ?? "", message: error.message }];
  for (const { field, message } of fields) {
    const [, number, parameter] = field.match(/^layer\[(\d+)\]\.?(\w*)/) ?? [];
    const [, operand] = field.match(/^(indices|weights|offsets|boxes)/) ?? [];
    if (operand && $(`layer-0-${operand}`)) fail(`layer-0-${operand}`, message);
    else if (operand || field.startsWith("branches")) fail("branches", `${field}: ${message}`);
    else if (number !== undefined) fail($(`layer-${number}-${parameter}`) ? `layer-${number}-${parameter}` : `layer-${number}`, message);
    else fail(field === "dtype" ? "input" : state.source === "grid" && /^(input|shape)/.test(field) ? "grid" : "input", field && !/^(input|shape)/.test(field) ? `${field}: ${message}` : message);
  }
}

/** Show a message at a field. */
function fail(id, message) {
  $("stage").dataset.stale = "";
  $("stale").hidden = !state.result;
  stop();
  const place = $(`${id}-error`) ?? $("input-error");
  place.textContent = message;
  $(id)?.setAttribute("aria-invalid", "true");
}

function clearErrors() {
  for (const each of document.querySelectorAll("#controls .error")) each.textContent = "";
  for (const each of document.querySelectorAll("[aria-invalid]")) each.removeAttribute("aria-invalid");
}

// ---- The picture ----

const before = (step) => (step ? state.result.steps[step - 1] : state.result.input);
const shapeText = (shape) => `(${shape.join(", ")}${shape.length === 1 ? "," : ""})`;

/** Show the shapes of all steps, and the selected step with its windows. */
async function showStep(signal) {
  const { input: given, steps, dims, layers } = state.result;
  const chips = [element("div", { class: "step" }, element("b", {}, "input"), element("small", {}, `${shapeText(given.shape)} ${given.dtype}`))];
  steps.forEach((each, i) => {
    const chip = element("button", { type: "button", "aria-current": i === state.step ? "step" : undefined }, element("b", {}, each.layer), element("small", {}, `${shapeText(each.shape)} ${each.dtype}`));
    chip.addEventListener("click", () => { state.step = i; state.index = 0; showStep().then(() => $("steps").querySelectorAll("button")[i]?.focus()); });
    chips.push(element("span", { class: "arrow", "aria-hidden": "true" }, "\u2192"), chip);
  });
  $("steps").replaceChildren(...chips);

  const step = steps[state.step];
  const count = planes(step, dims);
  state.plane = Math.min(state.plane, count - 1);
  $("plane-label").hidden = count < 2;
  const channels = planes(before(state.step), dims);
  const boxes = state.result.operand?.name === "boxes";
  const color = !boxes && count === 3 && dims === 2 && product(step.shape.slice(-2)) > 1 && given.shape.length === 3 && product(given.shape.slice(-2)) > MAX_CELLS;
  const names = [...(color ? ["all, as colors"] : []), ...Array.from({ length: count }, (_, i) => (boxes ? `${i % channels} of box ${Math.floor(i / channels)}` : String(i)))];
  if (names.join() !== $("plane").dataset.names) {
    $("plane").replaceChildren(...names.map((each, i) => element("option", { value: String(i - color) }, each)));
    state.plane = 0;
    $("plane").value = color ? "-1" : "0";
    $("plane").dataset.names = names.join();
  }
  const source = planeOf(before(state.step), dims, sourcePlane());
  state.explained = await explain(layers[state.step], source, signal);
  if (signal?.aborted) return;
  draw();
}

/** Return the plane of the input that the shown plane of the output is of: with boxes, each has all channels. */
const sourcePlane = () => state.plane % planes(before(state.step), state.result.dims);

/** Return where the windows of a layer with an operand are, as a function of the position of an output cell. */
function operandWindows(layer, plane, { name, value }) {
  const range = (low, high) => Array.from({ length: Math.max(0, high - low) }, (_, i) => low + i);
  if (name === "offsets") return { at: ([segment]) => [range(value[segment], value[segment + 1])] };
  if (name === "boxes") {
    const box = Math.floor(state.plane / planes(before(state.step), state.result.dims));
    const scale = Number(layer.values.spatial_scale || 1);
    const [x1, y1, x2, y2] = value[box].slice(1).map((each) => Math.round(each * scale));
    const axes = [[y1, y2], [x1, x2]].map(([low, high], axis) => range(Math.max(0, low), Math.min(plane.shape[axis], high + 1)));
    return { what: `box ${box}, `, at: () => axes };
  }
  const flat = value.flat(Infinity);
  const size = product(plane.shape);
  const own = flat.slice(sourcePlane() * size, (sourcePlane() + 1) * size);
  const sizes = state.result.steps[state.step].shape.slice(-plane.shape.length);
  return { at: (position) => {
    const found = own.lastIndexOf(position.reduce((number, each, axis) => number * sizes[axis] + each, 0));
    return found < 0 ? plane.shape.map(() => []) : unravel(found, plane.shape).map((each) => [each]);
  } };
}

/** Return the windows of a layer, from the server; null if it has no fixed ones. */
async function explain(layer, plane, signal) {
  const operand = state.step ? null : state.result.operand;
  if (operand && operand.name !== "weights") return Array.isArray(operand.value) ? operandWindows(layer, plane, operand) : null;
  if (!layerInfo(layer).spatial_dims) {
    return { windows: plane.shape.map((size) => Array.from({ length: size }, (_, i) => [i])), formulas: [], unvisited: plane.shape.map(() => []) };
  }
  const request = { layer: layerObject(layer) };
  const small = plane.values.length <= MAX_CELLS && !operand; // the explanation of a value knows no weights
  for (const given of small ? [{ input: nested(plane.values, plane.shape) }, { shape: plane.shape }] : [{ shape: plane.shape }]) {
    try {
      return (await call("/v1/explain", { ...request, ...given }, signal)).answer;
    } catch (error) {
      if (!(error instanceof CallError) || error.status === 503) throw error;
    }
  }
  return null;
}

/** Return a plane as slices of rows and columns: one, or one for each depth. */
function slices({ shape }) {
  const [depth, rows, columns] = [shape.length === 3 ? shape[0] : 1, shape.length > 1 ? shape.at(-2) : 1, shape.at(-1)];
  return { depth, rows, columns };
}

function draw() {
  const { dims } = state.result;
  const step = state.result.steps[state.step];
  const [source, target] = [planeOf(before(state.step), dims, sourcePlane()), planeOf(step, dims, state.plane)];
  $("stage-title").textContent = step.layer;
  $("show-label").hidden = !step.indices;
  if (!step.indices) $("show").value = "output";
  const indices = step.indices && $("show").value === "indices";
  const values = indices ? planeOf({ shape: step.shape, values: step.indices }, dims, state.plane).values : target.values;
  const windows = state.explained?.windows;
  const extents = source.shape.map((size, axis) => {
    const all = windows ? windows[axis].flat() : [];
    return [Math.min(0, ...(all.length < 5000 ? all : [0])), Math.max(size, ...(all.length < 5000 ? all.map((each) => each + 1) : [0]))];
  });
  const color = $("plane").value === "-1";
  const cells = target.shape.map((size) => [0, size]);
  const sizes = cellSizes([extents, cells], [source, target]);
  board($("in"), source, source.values, extents, sizes[0], state.explained?.unvisited ?? [], color ? before(state.step) : null);
  board($("out"), target, values, cells, sizes[1], [], color && !indices ? step : null);
  drawBranches(color);
  $("in-caption").textContent = `Input ${shapeText(source.shape)}`;
  $("out-caption").textContent = `${indices ? "Indices" : "Output"} ${shapeText(target.shape)}`;
  const table = source.values.length <= MAX_CELLS;
  $("padding-legend").hidden = !(table && extents.some(([low, high], axis) => low < 0 || high > source.shape[axis]));
  $("unvisited-legend").hidden = !(table && state.explained?.unvisited?.some((each) => each.length));
  $("formulas").replaceChildren(...(state.explained?.formulas ?? []).flatMap((each) => {
    const at = each.indexOf(": ");
    return [element("dt", {}, each.slice(0, at)), element("dd", {}, each.slice(at + 2))];
  }));
  const count = target.values.length;
  $("player").hidden = $("legend").hidden = !(windows || state.explained?.at) || !count;
  $("window").max = Math.max(0, count - 1);
  setIndex(Math.min(state.index, Math.max(0, count - 1)));
  if (!state.explained) {
    stop();
    $("how").textContent = "The windows of this layer are not the same for every plane, so only its output is shown.";
  } else play(state.playing ?? !matchMedia("(prefers-reduced-motion: reduce)").matches);
}

/** Show the output of each branch, if there are several. */
function drawBranches(color) {
  const { branches, dims } = state.result;
  $("branches-card").hidden = branches.length < 2;
  $("branch-boards").replaceChildren(...(branches.length < 2 ? [] : branches.map((each) => {
    const caption = element("figcaption", {}, element("b", {}, each.layer), element("small", {}, `${each.shapes.map(shapeText).join(" \u2192 ")} ${each.dtype}`));
    return element("figure", { class: "board" }, caption, element("div", { class: "plane" }));
  })));
  [...$("branch-boards").children].forEach((figure, i) => {
    const count = planes(branches[i], dims);
    const target = planeOf(branches[i], dims, Math.min(state.plane, count - 1));
    const columns = target.shape.at(-1);
    const cell = Math.max(22, Math.min(48, 280 / columns));
    board(figure.lastChild, target, target.values, target.shape.map((size) => [0, size]), cell, [], color && count === 3 ? branches[i] : null);
  });
}

// Return the size of a cell of each board, in pixels: as large as both have room for, side by side, or one below the
// other on a phone.
function cellSizes(extents, planes) {
  const room = $("stage").clientWidth - 40;
  const columns = extents.map((each) => (each.at(-1)[1] - each.at(-1)[0]) * (each.length === 3 ? Math.min(2, each[0][1] - each[0][0]) : 1));
  const rows = extents.map((each) => (each.length > 1 ? each.at(-2)[1] - each.at(-2)[0] : 1));
  const pictures = planes.map((each) => each.values.length > MAX_CELLS);
  const taken = columns.map((each, i) => (pictures[i] ? 0 : each));
  const beside = (room - 130 - pictures.filter(Boolean).length * 380) / (taken[0] + taken[1] || 1);
  return columns.map((each, i) => Math.max(22, Math.min(64, Math.floor((innerWidth > 640 ? beside : room / each) - 3), 600 / rows[i])));
}

/** Draw a plane: a table of few numbers, a picture of many. */
function board(place, plane, values, extents, cell, unvisited, colors) {
  const { depth, rows, columns } = slices(plane);
  const finite = values.filter(Number.isFinite);
  const [low, high] = finite.reduce(([a, b], each) => [Math.min(a, each), Math.max(b, each)], [Infinity, -Infinity]);
  if (values.length > MAX_CELLS) return picture(place, plane, values, low, high, extents, colors);
  const [deep, tall, wide] = [...Array(3 - extents.length).fill([0, 1]), ...extents];
  const missing = [...Array(3 - extents.length).fill([]), ...unvisited];
  const longest = Math.max(...Array.from(values, (each) => text(each).length), 1);
  const digits = Math.max(10, Math.min(17, cell / 2.6, (cell - 6) / (0.61 * longest)));
  place.style.setProperty("--size", `${Math.max(cell, 0.61 * longest * digits + 5)}px`);
  place.style.setProperty("--digits", `${digits}px`);
  const tables = [];
  for (let z = deep[0]; z < deep[1]; z++) {
    const body = element("tbody");
    for (let y = tall[0]; y < tall[1]; y++) {
      const row = element("tr");
      for (let x = wide[0]; x < wide[1]; x++) {
        const inside = z >= 0 && z < depth && y >= 0 && y < rows && x >= 0 && x < columns;
        const made = element("td");
        made.dataset.at = `${z} ${y} ${x}`;
        if (inside) {
          const value = values[(z * rows + y) * columns + x];
          made.textContent = text(value);
          if (missing[0]?.includes(z) || missing[1]?.includes(y) || missing[2]?.includes(x)) made.className = "unvisited";
          else if (high > low) made.style.setProperty("--share", `${Math.round(100 * (Math.min(Math.max(value, low), high) - low) / (high - low)) || 0}%`);
        } else {
          made.className = "padding";
          made.textContent = "\u00b7";
        }
        row.append(made);
      }
      body.append(row);
    }
    tables.push(element("table", {}, ...(deep[1] - deep[0] > 1 ? [element("caption", {}, z < 0 || z >= depth ? "padding" : `depth ${z}`)] : []), body));
  }
  place.replaceChildren(...tables);
  const scrolls = place.scrollWidth > place.clientWidth;
  if (scrolls) { place.tabIndex = 0; place.setAttribute("role", "region"); place.setAttribute("aria-label", place.id === "in" ? "Input, scrolls" : "Output, scrolls"); }
  else { place.removeAttribute("tabindex"); place.removeAttribute("role"); place.removeAttribute("aria-label"); }
}

function picture(place, plane, values, low, high, extents, colors) {
  const { depth, rows, columns } = slices(plane);
  const canvas = element("canvas", { width: columns, height: rows * depth });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows * depth);
  const size = rows * columns * depth;
  const shade = (value) => (high > low ? (255 * (value - low)) / (high - low) : 128);
  for (let i = 0; i < size; i++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = colors ? colors.values[c * size + i] : shade(values[i]);
    pixels.data[4 * i + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  const scale = Math.max(1, Math.floor((place.id === "in" ? 460 : 300) / Math.max(columns, rows * depth)));
  canvas.style.width = `${columns * scale}px`;
  const over = element("canvas", { width: columns * 8, height: rows * depth * 8 });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${place.id === "in" ? "Input" : "Output"} of ${rows} rows and ${columns} columns, from ${text(low)} to ${text(high)}`);
  over.setAttribute("aria-hidden", "true");
  place.removeAttribute("tabindex");
  place.replaceChildren(element("div", { class: "picture" }, canvas, over));
}

/** Mark cells, by their positions on each axis, in a table or on a picture. */
function mark(id, plane, positions) {
  const [deep, tall, wide] = [...Array(3 - positions.length).fill([0]), ...positions];
  const { rows } = slices(plane);
  const over = $(id).querySelectorAll("canvas")[1];
  if (!over) {
    const cells = new Set(deep.flatMap((z) => tall.flatMap((y) => wide.map((x) => `${z} ${y} ${x}`))));
    for (const cell of $(id).querySelectorAll("td")) cell.classList.toggle("inside", cells.has(cell.dataset.at));
    return;
  }
  const context = over.getContext("2d");
  context.clearRect(0, 0, over.width, over.height);
  if (!tall.length || !wide.length) return;
  context.lineWidth = Math.max(2, over.width / 180);
  const stroke = probe("--window");
  context.strokeStyle = stroke;
  context.fillStyle = stroke;
  for (const z of deep) {
    const [top, bottom] = [tall[0], tall.at(-1) + 1].map((each) => 8 * (z * rows + each));
    const [left, right] = [wide[0], wide.at(-1) + 1].map((each) => 8 * each);
    context.globalAlpha = 0.4;
    for (const y of tall) for (const x of wide) context.fillRect(8 * x, 8 * (z * rows + y), 8, 8);
    context.globalAlpha = 1;
    context.strokeRect(left - 1, top - 1, right - left + 2, bottom - top + 2);
  }
}

/** Return a color of the stylesheet in a form that a canvas takes, for the present theme. */
function probe(name) {
  const made = element("i");
  made.style.color = `var(${name})`;
  document.body.append(made);
  const color = getComputedStyle(made).color;
  made.remove();
  return color;
}

function setIndex(index) {
  if (!state.result) return;
  const { dims } = state.result;
  const step = state.result.steps[state.step];
  const [source, target] = [planeOf(before(state.step), dims, sourcePlane()), planeOf(step, dims, state.plane)];
  state.index = index;
  $("window").value = index;
  const at = unravel(index, target.shape);
  const count = target.values.length;
  $("window-number").textContent = `${count ? index + 1 : 0} of ${count}`;
  $("window").setAttribute("aria-valuetext", `window ${index + 1} of ${count}`);
  const windows = state.explained?.windows;
  if (!(windows || state.explained?.at) || !count) return;
  const positions = windows ? at.map((each, axis) => windows[axis][each]) : state.explained.at(at);
  mark("in", source, positions);
  mark("out", target, at.map((each) => [each]));
  const names = ["depth", "row", "column"].slice(3 - dims);
  const where = positions.some((each) => !each.length) ? "no cell" : (state.explained.what ?? "") + positions.map((each, axis) => (each.length > 1 ? `${names[axis]}s ${each[0]} to ${each.at(-1)}` : `${names[axis]} ${each[0]}`)).join(", ");
  const channels = $("plane").value === "-1" ? [0, 1, 2] : [state.plane];
  const value = state.explained.values?.[index] ?? channels.map((each) => text(planeOf(step, dims, each).values[index])).join(", ");
  const found = step.indices ? `; index ${planeOf({ shape: step.shape, values: step.indices }, dims, state.plane).values[index]}` : "";
  // While windows move by themselves, a screen reader would never end.
  $("how").setAttribute("aria-live", state.timer ? "off" : "polite");
  $("how").textContent = `${where}: ${value}${found}`;
}

function move(difference) {
  const count = Number($("window").max) + 1;
  setIndex((state.index + difference + count) % count);
}

function stop() {
  clearInterval(state.timer);
  state.timer = 0;
  delete $("play").dataset.playing;
  $("play").setAttribute("aria-label", "Play");
}

function play(on) {
  stop();
  state.playing = on;
  const count = Number($("window").max) + 1;
  if (!on || count < 2) return;
  state.timer = setInterval(() => move(1), Math.max(40, Math.min(900, 12000 / count)));
  $("play").dataset.playing = "";
  $("play").setAttribute("aria-label", "Pause");
}

// ---- The other cards ----

function showTimes(timing, total) {
  const served = STAGES.slice(0, 4);
  const known = served.reduce((sum, each) => sum + (timing[each] ?? 0), 0);
  const times = { ...timing, network: Math.max(0, total - known) };
  const what = (stage) => (stage === "network" ? "outside" : stage);
  $("total").replaceChildren(`${known.toFixed(known < 10 ? 2 : 1)} ms `, element("small", {}, "in the server"));
  $("bar").replaceChildren(...served.map((each) => {
    const part = element("i", { class: each });
    part.style.flexGrow = times[each] ?? 0;
    return part;
  }));
  $("stages").replaceChildren(...STAGES.flatMap((each) => [element("dt", {}, each === "network" ? null : element("i", { class: `key ${each}` }), what(each)), element("dd", {}, `${(times[each] ?? 0).toFixed(2)} ms`)]));
}

const bytes = (count) => (count < 1e6 ? `${(count / 1e3).toFixed(count < 1e4 ? 1 : 0)} kB` : count < 1e9 ? `${(count / 1e6).toFixed(1)} MB` : `${(count / 1e9).toFixed(2)} GB`);

function showLoad(load) {
  const { limits, threads } = state.info;
  const rows = [
    ["calls", load.calls],
    ["queue", `${load.queue.reduce((a, b) => a + b, 0)} of ${limits.max_queue.value}`],
    ["threads", threads],
    ["in flight", `${bytes(load.inflight_bytes)} of ${bytes(limits.max_inflight_bytes.value)}`],
    ["memory", bytes(load.memory_bytes)],
    ["arenas", load.arenas],
    ["streams", load.streams],
  ];
  $("load").replaceChildren(...rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))]));
  if ($("status").dataset.state === "wait") setStatus("up", "connected");
}

/** Return the address of gRPC for a client on the machine of this browser. */
function address() {
  const found = state.info.addresses.find((each) => !each.startsWith("unix:")) ?? state.info.addresses[0] ?? "127.0.0.1:50051";
  if (found.startsWith("unix:")) return found;
  const port = found.slice(found.lastIndexOf(":") + 1);
  return `${location.hostname}:${port}`;
}

const quoted = (words) => `'${words.replaceAll("'", `'"'"'`)}'`;

function snippets() {
  const { input: given, layer, steps, branches, operand, request } = state.result;
  const small = given.values.length <= 64;
  const secured = state.info.features.tokens === "on";
  const list = JSON.stringify(nested(given.values, given.shape)).replaceAll(",", ", ");
  const grid = small ? list.replaceAll('"', "") .replaceAll("NaN", "np.nan") : null;
  const rank = given.shape.length === state.result.dims ? "[None]" : "";
  const second = operand ? `, ${operand.name}=${operand.name}` : "";
  const outputs = steps.length > 1 ? "result.shapes" : steps[0].indices ? "result.indices" : "result.shape";
  const python = [
    "import numpy as np", "from poolrpc import PoolClient", "",
    small ? `x = np.array(${grid}, np.${given.dtype === "bool" ? "bool_" : given.dtype})${rank}` : `x = np.load("input.npy")  # ${given.dtype} ${shapeText(given.shape)}`,
    ...(operand ? [`${operand.name} = np.array(${JSON.stringify(operand.value).replaceAll(",", ", ")})${operand.name === "indices" ? rank : ""}`] : []),
    "", ...(secured ? ["# POOLRPC_TOKEN in the environment has the token"] : []),
    `with PoolClient(${JSON.stringify(address())}) as client:`,
    ...(branches.length > 1
      ? [`    results = client.pool_each(x, [${branches.map((each) => JSON.stringify(each.layer)).join(", ")}]${second})`, "for result in results:", "    print(result.output, result.shape)"]
      : [`    result = client.pool(x, ${JSON.stringify(layer)}${second})`, `print(result.output, ${outputs})`]),
  ].join("\n");
  const single = steps.length === 1 && branches.length === 1 && !operand && state.explained && given.shape.length === state.result.dims && small && layerInfo(state.result.layers[0]).spatial_dims;
  const command = single
    ? `poolrpc explain ${quoted(layer)} \\\n  --input ${quoted(list)} \\\n  --address ${address()}`
    : `${operand
      ? `# input.npz: np.savez("input.npz", x=x, ${operand.name}=${operand.name})\npoolrpc pool input.npz`
      : `# input.npy: np.save("input.npy", x) for ${given.dtype} ${shapeText(given.shape)}\npoolrpc pool input.npy`} \\\n${branches.map((each) => `  --layer ${quoted(each.layer)} \\\n`).join("")}  --address ${address()} --save output.${branches.length > 1 ? "npz" : "npy"}`;
  const body = { layer, branches: request.branches, input: small ? nested(given.values, given.shape) : { data: "(base64)", shape: given.shape, dtype: given.dtype } };
  if (small && given.dtype !== "float32") body.dtype = request.dtype;
  if (operand) body[operand.name] = operand.value;
  const json = `curl ${secured ? '-H "Authorization: Bearer $POOLRPC_TOKEN" \\\n  ' : ""}${location.origin}/v1/pool \\\n  -d ${quoted(JSON.stringify(body))}`;
  return { python, command, json };
}

function showCode() {
  if (state.result) $("code").textContent = snippets()[state.tab];
}

function selectTab(name) {
  state.tab = name;
  for (const each of ["python", "command", "json"]) {
    const tab = $(`tab-${each}`);
    tab.setAttribute("aria-selected", String(each === name));
    tab.tabIndex = each === name ? 0 : -1;
  }
  $("code").setAttribute("aria-labelledby", `tab-${name}`);
  showCode();
}

async function copy() {
  try {
    await navigator.clipboard.writeText($("code").textContent);
  } catch { // without a secure context
    getSelection().selectAllChildren($("code"));
    document.execCommand("copy");
  }
  $("copy").textContent = "Copied";
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
}

// ---- Beginning ----

const THEMES = ["auto", "light", "dark"];
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").lastChild.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
  setIndex(state.index);
}

function start() {
  $("source").replaceChildren(...Object.entries(SOURCES).map(([id, { name }]) => element("option", { value: id }, name)));
  const dtypes = new Set(state.info.layers.flatMap((each) => each.dtypes));
  dtypes.delete("bfloat16"); // which JSON's lists do not have
  $("dtype").replaceChildren(...choose([...dtypes], "float32"));
  setSource("plane");
  state.layers = [newLayer("MaxPool2d")];
  showLayers();
  run();
}

$("source").addEventListener("change", () => {
  const before = input.last ?? "plane";
  setSource($("source").value);
  if (state.source === "grid" && !$("grid").value) {
    const given = (SOURCES[before].make ?? SOURCES.plane.make)();
    const usable = given.values.length <= MAX_CELLS ? given : SOURCES.plane.make();
    const rows = usable.shape.length > 1 ? usable.shape.at(-1) : usable.values.length;
    $("grid").value = Array.from({ length: usable.values.length / rows }, (_, i) => [...usable.values.subarray(i * rows, (i + 1) * rows)].join(" ")).join("\n");
  }
  input.last = state.source;
  for (const each of state.layers) delete each.operand; // it was for another input
  const { dims } = SOURCES[state.source];
  if (dims && dims !== dimsOf(state.layers)) {
    state.layers = [newLayer(`MaxPool${dims}d`)];
    showLayers();
  }
  state.index = 0;
  changed();
});
$("grid").addEventListener("input", changed);
$("branches").addEventListener("input", changed);
$("dtype").addEventListener("change", changed);
$("file").addEventListener("change", async () => {
  try {
    state.image = await readImage($("file").files[0]);
    changed();
  } catch {
    fail("input", "expected an image that this browser can read, got another file");
  }
});
$("add").addEventListener("click", () => {
  const dims = dimsOf(state.layers) || 2;
  state.layers.push(newLayer(`AvgPool${dims}d`));
  state.step = state.layers.length - 1;
  showLayers();
  $(`layer-${state.layers.length - 1}-name`).focus();
  changed();
});
$("controls").addEventListener("submit", (event) => { event.preventDefault(); run(); });
$("token-form").addEventListener("submit", (event) => { event.preventDefault(); state.token = $("token").value.trim(); connect(); });
$("plane").addEventListener("change", () => { state.plane = Math.max(0, Number($("plane").value)); showStep().catch(failed); });
$("show").addEventListener("change", draw);
$("previous").addEventListener("click", () => { play(false); move(-1); });
$("next").addEventListener("click", () => { play(false); move(1); });
$("play").addEventListener("click", () => { play(!state.timer); });
$("window").addEventListener("input", () => { play(false); setIndex(Number($("window").value)); });
$("out").addEventListener("click", (event) => {
  const { rows, columns } = slices(planeOf(state.result.steps[state.step], state.result.dims, state.plane));
  const cell = event.target.closest("td");
  const box = event.target.getBoundingClientRect();
  const { depth } = slices(planeOf(state.result.steps[state.step], state.result.dims, state.plane));
  const [z, y, x] = cell ? cell.dataset.at.split(" ").map(Number) : [0, Math.floor(((event.clientY - box.top) / box.height) * rows * depth), Math.floor(((event.clientX - box.left) / box.width) * columns)];
  if (cell || event.target.tagName === "CANVAS") { play(false); setIndex((z * rows + y) * columns + x); }
});
$("copy").addEventListener("click", copy);
$("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % 3]));
for (const name of ["python", "command", "json"]) {
  $(`tab-${name}`).addEventListener("click", () => selectTab(name));
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    const names = ["python", "command", "json"];
    const to = { ArrowRight: 1, ArrowLeft: 2 }[event.key];
    if (to) { selectTab(names[(names.indexOf(name) + to) % 3]); $(`tab-${state.tab}`).focus(); }
  });
}
let drawn = innerWidth;
addEventListener("resize", () => { if (innerWidth !== drawn && state.result) { drawn = innerWidth; draw(); } });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setIndex(state.index));
addEventListener("visibilitychange", () => { if (document.hidden) stop(); else if (state.playing) play(true); });
connect().then(poll);
