"use strict";
// Reading what encoding.py packed, and what maps and curves share: colours, names, numbers. Whatever comes from a run
// becomes text by textContent alone.

const MODEL = JSON.parse(document.getElementById("model").textContent);
const RUNS = MODEL.runs;
const UNDEFINED = 255, ZERO = 254;
const WIDTHS_IN_BAND = 3;
// Of matplotlib's cividis and RdBu_r, at even distances: the colours of all pictures of this package.
const VALUES = "00224e002e6a1a386f32436d434e6c535a6d61656f6f70737d7c788c88789b9476aba072bcae6ccdbb63dec958f0d846fee838";
const SIGNED = "0530611752902a71b23f8ec06bacd19bc9e0c2ddece0ecf3f7f6f6fbe5d8fbccb4f5aa89e48066d05548ba2832930e2667001f";
const GREY = "#b0b0b0";

for (const run of RUNS) {
  run.offsets = { key: [0], query: [0] };
  for (const [, , keys, queries] of run.layers) {
    run.offsets.key.push(run.offsets.key.at(-1) + keys);
    run.offsets.query.push(run.offsets.query.at(-1) + queries);
  }
}

function stops(text) {
  return text.match(/.{6}/g).map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
}

// A table of 256 colours between the stops.
function palette(text) {
  const given = stops(text);
  return Array.from({ length: 256 }, (_, at) => {
    const place = (at / 255) * (given.length - 1), below = Math.min(Math.floor(place), given.length - 2);
    const mixed = given[below].map((from, part) => Math.round(from + (given[below + 1][part] - from) * (place - below)));
    return `rgb(${mixed.join(",")})`;
  });
}

const PALETTES = { value: palette(VALUES), drift: palette(SIGNED) };

function bytesOf(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let at = 0; at < raw.length; at++) bytes[at] = raw.charCodeAt(at);
  return bytes;
}

const unpacked = new Map();

// A packed array: its values by head and position; null where the page holds none of that name.
function unpack(id, heads) {
  if (!unpacked.has(id)) unpacked.set(id, reallyUnpack(id, heads));
  return unpacked.get(id);
}

async function reallyUnpack(id, heads) {
  const element = document.getElementById(id);
  if (element === null) return null;
  const stream = new Blob([bytesOf(element.textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const low = new Float32Array(buffer, 0, heads), step = new Float32Array(buffer, 4 * heads, heads);
  const codes = new Uint8Array(buffer, 8 * heads);
  const count = heads ? codes.length / heads : 0;
  for (let head = 0; head < heads; head++) {
    for (let at = head * count + 1; at < (head + 1) * count; at++) codes[at] += codes[at - 1];
  }
  const value = (head, at) => {
    const code = codes[head * count + at];
    if (code === UNDEFINED || code === undefined) return NaN;
    return code === ZERO ? 0 : Math.exp(low[head] + step[head] * code);
  };
  return { value, count };
}

function headsOf(run, kind) {
  return run.offsets[kind].at(-1);
}

function statisticOf(run, name) {
  return run.statistics.findIndex((row) => row.name === name);
}

// Position of the last of some ascending steps that is not behind `step`; the first if all are.
function positionAt(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (steps[middle] <= step) low = middle;
    else high = middle - 1;
  }
  return low;
}

function labelOf(run, kind, layer, head) {
  const two = (number) => String(number).padStart(2, "0");
  return `L${two(run.layers[layer][1])}/${kind === "key" ? "KV" : "Q"}${two(head)}`;
}

function number(value) {
  if (!Number.isFinite(value)) return "-";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}

function make(name, text, attributes = {}) {
  const element = document.createElement(name);
  if (text !== null) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
