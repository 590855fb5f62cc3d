"use strict";
// The curves of one head: every statistic over the steps, with what its baseline expected and where alerts were.

const SVG = "http://www.w3.org/2000/svg";
const EDGE = { left: 58, right: 14, top: 14, bottom: 36 };
const HIGH = 210;

function draw(parent, name, attributes, text = null) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  parent.append(element);
  return element;
}

// Round numbers within a range, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const found = [];
  for (let at = Math.ceil(low / step); at * step <= high * (1 + 1e-12); at++) found.push(at * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.ceil(Math.log10(low)); 10 ** power <= high; power++) found.push(10 ** power);
  if (found.length < 2) return [low, Math.sqrt(low * high), high];
  const each = Math.ceil(found.length / 5);
  return found.filter((_, at) => at % each === 0);
}

// Pieces of a line between undefined values, as the d of a path; a value between two of them is a dot.
function pathOf(points) {
  let text = "", open = false;
  for (const [x, y] of points) {
    if (!Number.isFinite(y)) { open = false; continue; }
    text += open ? `L${x.toFixed(1)} ${y.toFixed(1)}` : `M${x.toFixed(1)} ${y.toFixed(1)}h0`;
    open = true;
  }
  return text;
}

// One area for each stretch in which both edges are known.
function areasOf(points) {
  const areas = [];
  let stretch = [];
  const end = () => {
    if (stretch.length) {
      const there = stretch.map(([x, upper]) => `${x.toFixed(1)} ${upper.toFixed(1)}`);
      const back = stretch.map(([x, , lower]) => `${x.toFixed(1)} ${lower.toFixed(1)}`).reverse();
      areas.push(`M${[...there, ...back].join("L")}Z`);
    }
    stretch = [];
  };
  for (const point of points) {
    if (Number.isFinite(point[1]) && Number.isFinite(point[2])) stretch.push(point);
    else end();
  }
  end();
  return areas.join("");
}

function boundsOf(series) {
  let low = Infinity, high = -Infinity, least = Infinity;
  for (const { values } of series) {
    for (const value of values) {
      if (!Number.isFinite(value)) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
      if (value > 0) least = Math.min(least, value);
    }
  }
  if (low > high) return null;
  const logarithmic = Number.isFinite(least) && high / least > 30;
  if (logarithmic) return { low: least / 1.15, high: high * 1.15, logarithmic };
  const room = 0.06 * (high - low) || 0.05 * Math.abs(high) || 0.5;
  return { low: low - room, high: high + room, logarithmic };
}

// A chart: `series` of {steps, values, className, name}, `band` of [step, expected, width], `marks` of alerts.
// Returns {figure, show(step)}.
function chart({ title, unit, series, band, marks, spans, width, onStep, note }) {
  const figure = make("figure", null, { class: "chart" });
  figure.append(make("figcaption", title));
  const bounds = boundsOf(series);
  const readout = make("p", "", { class: "readout", style: `width: ${width}px` });
  figure.style.width = `${width}px`;
  if (bounds === null) {
    figure.append(make("p", `${note ? `${note} ` : ""}No value.`, { class: "readout" }));
    return { figure, show: () => {} };
  }
  const first = Math.min(...series.map(({ steps }) => steps[0])), last = Math.max(...series.map(({ steps }) => steps.at(-1)));
  const inner = width - EDGE.left - EDGE.right, tall = HIGH - EDGE.top - EDGE.bottom;
  const x = (step) => EDGE.left + (last > first ? (step - first) / (last - first) : 0.5) * inner;
  const up = bounds.logarithmic ? Math.log : (value) => value;
  const bottom = up(bounds.low), whole = up(bounds.high) - bottom;
  const y = (value) => EDGE.top + (1 - (up(Math.max(value, bounds.logarithmic ? bounds.low : -Infinity)) - bottom) / whole) * tall;
  const within = (value) => Math.min(EDGE.top + tall, Math.max(EDGE.top, y(value)));
  const svg = draw(figure, "svg", { viewBox: `0 0 ${width} ${HIGH}`, width, height: HIGH, role: "img", "aria-label": title });
  for (const value of bounds.logarithmic ? logTicks(bounds.low, bounds.high) : ticks(bounds.low, bounds.high, 4)) {
    draw(svg, "line", { x1: EDGE.left, x2: width - EDGE.right, y1: y(value), y2: y(value), class: "grid" });
    draw(svg, "text", { x: EDGE.left - 6, y: y(value) + 4, class: "tick end" }, number(value));
  }
  for (const step of ticks(first, last, Math.max(2, Math.floor(inner / 90)))) {
    if (step !== Math.round(step) || x(step) > width - EDGE.right - 34) continue;
    draw(svg, "text", { x: x(step), y: HIGH - EDGE.bottom + 16, class: "tick middle" }, String(step));
  }
  draw(svg, "text", { x: width - EDGE.right, y: HIGH - EDGE.bottom + 16, class: "tick end" }, "step");
  draw(svg, "text", { x: 4, y: HIGH - 5, class: "tick" }, unit + (bounds.logarithmic ? ", log scale" : ""));
  if (band.length) {
    const edges = band.map(([step, expected, wide]) => [
      x(step), within(expected * Math.exp(WIDTHS_IN_BAND * wide)), within(expected * Math.exp(-WIDTHS_IN_BAND * wide)),
    ]);
    draw(svg, "path", { d: areasOf(edges), class: "band" });
    draw(svg, "path", { d: pathOf(band.map(([step, value]) => [x(step), Number.isFinite(value) ? within(value) : NaN])), class: "expected" });
  }
  for (const [from, to] of spans) {
    const wide = Math.max(x(to) - x(from), 3);
    draw(svg, "rect", { x: x(from), y: EDGE.top + tall, width: wide, height: 4, class: "under" });
  }
  for (const { since, step, own, id, text } of marks) {
    draw(svg, "rect", { x: x(since), y: EDGE.top, width: Math.max(x(step) - x(since), 1), height: tall, class: "onset" });
    const link = draw(svg, "a", { href: `#${id}`, class: own ? "mark own" : "mark" });
    draw(link, "title", {}, text);
    draw(link, "line", { x1: x(step), x2: x(step), y1: EDGE.top, y2: EDGE.top + tall });
    draw(link, "path", { d: `M${x(step) - 6} ${EDGE.top - 12}h12l-6 11z` });
  }
  for (const { steps, values, className } of series) {
    draw(svg, "path", { d: pathOf(steps.map((step, at) => [x(step), y(values[at])])), class: `line ${className}` });
  }
  const now = draw(svg, "line", { y1: EDGE.top, y2: EDGE.top + tall, class: "now" });
  figure.append(readout);
  const show = (step) => {
    const at = Math.min(last, Math.max(first, step));
    now.setAttribute("x1", x(at));
    now.setAttribute("x2", x(at));
    // The head's own line is the last; a run that ended before stays at its end.
    const reached = ({ steps }) => steps[positionAt(steps, step)], own = reached(series.at(-1));
    const parts = [...series].reverse().map((each) => {
      const value = number(each.values[positionAt(each.steps, step)]), at = reached(each);
      return `${each.name} ${value}${at === own ? "" : ` (step ${at})`}`;
    });
    if (band.length) {
      const [, expected, wide] = band[positionAt(band.map((each) => each[0]), step)];
      if (Number.isFinite(expected)) {
        const lower = expected * Math.exp(-WIDTHS_IN_BAND * wide), upper = expected * Math.exp(WIDTHS_IN_BAND * wide);
        parts.push(`expected ${number(expected)} (${number(lower)} to ${number(upper)})`);
      }
    }
    readout.textContent = `step ${own}: ${parts.join("; ")}${note ? `. ${note}` : ""}`;
  };
  svg.addEventListener("click", (event) => {
    if (event.target.closest("a")) return;
    const box = svg.getBoundingClientRect(), place = ((event.clientX - box.left) / box.width) * width;
    onStep(first + ((place - EDGE.left) / inner) * (last - first));
  });
  return { figure, show };
}
