"use strict";
// What is shown now, and what changes it.

const byId = (id) => document.getElementById(id);
const ALL_STEPS = [...new Set(RUNS.flatMap((run) => run.steps))].sort((one, other) => one - other);
const now = { statistic: "", mode: "value", step: ALL_STEPS.at(-1), run: 0, kind: "key", layer: 0, head: 0 };
const OTHERS = ["other-1", "other-2", "other-3"];
let charts = [], drawing = 0, charting = 0;

const figures = RUNS.map((run, at) => {
  const figure = make("figure", null, { class: "map" });
  const canvas = make("canvas", null, { tabindex: 0, role: "img" });
  figure.append(make("figcaption", ""), canvas);
  byId("maps").append(figure);
  const cursor = { layer: 0, head: 0 };
  canvas.addEventListener("mousemove", (event) => {
    const cell = cellAt(canvas, run, event);
    if (cell) tell(at, cell[0], cell[1]);
  });
  canvas.addEventListener("click", (event) => {
    const cell = cellAt(canvas, run, event);
    if (cell) {
      [cursor.layer, cursor.head] = cell;
      choose(at, kindNow(), ...cell);
    }
  });
  canvas.addEventListener("focus", () => {
    if (now.run === at && now.kind === kindNow()) [cursor.layer, cursor.head] = [now.layer, now.head];
    tell(at, cursor.layer, cursor.head);
    drawMaps();
  });
  canvas.addEventListener("blur", () => drawMaps());
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Enter" || event.key === " ") choose(at, kindNow(), cursor.layer, cursor.head);
    else if (moves[event.key]) {
      const heads = (layer) => run.layers[layer][kindNow() === "key" ? 2 : 3];
      const within = (value, count) => Math.max(0, Math.min(count - 1, value));
      cursor.layer = within(cursor.layer + moves[event.key][0], run.layers.length);
      cursor.head = within(cursor.head + moves[event.key][1], heads(cursor.layer));
      tell(at, cursor.layer, cursor.head);
      drawMaps();
    } else return;
    event.preventDefault();
  });
  return { figure, canvas, cursor };
});

function cellAt(canvas, run, event) {
  const box = canvas.getBoundingClientRect();
  const [layer, head] = gridOf(run, kindNow(), canvas.parentElement.clientWidth).at(event.clientX - box.left, event.clientY - box.top);
  const known = layer >= 0 && layer < run.layers.length && head >= 0 && head < run.layers[layer][kindNow() === "key" ? 2 : 3];
  return known ? [layer, head] : null;
}

function rowNow() {
  return RUNS.flatMap((run) => run.statistics).find((row) => row.name === now.statistic);
}

function kindNow() {
  return rowNow().kind;
}

// Values of a run's map by layer and head at the step that is shown, with that step; null where it has none.
async function shownOf(at) {
  const run = RUNS[at], index = statisticOf(run, now.statistic), drift = now.mode === "drift";
  if (index < 0) return null;
  const kind = kindNow(), steps = drift ? run.bandSteps : run.steps;
  const block = await unpack(`${drift ? "d" : "v"}-${at}-${index}`, headsOf(run, kind));
  if (block === null) return null;
  const position = positionAt(steps, now.step);
  const valueAt = (layer, head) => {
    const value = block.value(run.offsets[kind][layer] + head, position);
    return drift ? Math.log(value) : value;
  };
  return { valueAt, step: steps[position] };
}

async function drawMaps() {
  const mine = ++drawing, row = rowNow(), scale = scaleOf(now.mode, now.statistic);
  const shown = await Promise.all(RUNS.map((run, at) => shownOf(at)));
  if (mine !== drawing) return;
  RUNS.forEach((run, at) => {
    const { figure, canvas, cursor } = figures[at];
    const place = positionAt(run.steps, now.step), step = shown[at] ? shown[at].step : run.steps[place];
    const framed = run.spans.filter(([kind, , , from, to]) => kind === row.kind && from <= place && place <= to);
    const chosen = document.activeElement === canvas ? [cursor.layer, cursor.head]
      : now.kind === row.kind && RUNS[at].layers[now.layer] && now.run === at ? [now.layer, now.head] : null;
    const what = now.mode === "drift" ? `${row.title}, drift` : row.title;
    const count = framed.length === 1 ? "1 head framed" : `${framed.length} heads framed`;
    const missing = now.mode === "drift" ? " (not judged in this run)" : " (not recorded in this run)";
    const title = `${what}${shown[at] ? "" : missing}. Run ${run.name}, step ${step}: ${count}`;
    figure.firstChild.textContent = title;
    canvas.setAttribute("aria-label", `${title}. Arrow keys move, Enter shows the head's curves.`);
    drawMap(canvas, run, {
      kind: row.kind, mode: now.mode, scale, unit: row.unit, chosen,
      framed: framed.map(([, layer, head]) => [layer, head]),
      valueAt: shown[at] ? shown[at].valueAt : () => NaN,
    });
  });
}

async function tell(at, layer, head) {
  const run = RUNS[at], row = rowNow(), shown = await shownOf(at);
  if (shown === null || !run.layers[layer]) return;
  const value = number(shown.valueAt(layer, head)), unit = now.mode === "drift" ? "of its threshold" : row.unit;
  const where = `${labelOf(run, row.kind, layer, head)} (${row.kind} head ${head} of layer ${run.layers[layer][1]}, ${run.layers[layer][0]})`;
  byId("cell").textContent = `${run.name}, step ${shown.step}, ${where}: ${row.title} ${value} ${unit}`;
}

function choose(run, kind, layer, head) {
  Object.assign(now, { run, kind, layer, head });
  drawMaps();
  drawCurves();
}

// The alerts of a run that are about a head, its layer or the whole model.
function alertsOf(run, kind, layer, head) {
  return run.alerts.filter((alert) => alert.kind === "model" || (alert.layer === layer
    && (alert.kind === "layer" || (alert.kind === kind && alert.head === head))));
}

async function curvesOf(at, index, kind, layer, head) {
  const run = RUNS[at], own = run.offsets[kind][layer] + head, count = headsOf(run, kind);
  const block = await unpack(`v-${at}-${index}`, count);
  const [expected, width] = await Promise.all(["e", "w"].map((part) => unpack(`${part}-${at}-${index}`, count)));
  const values = run.steps.map((_, position) => block.value(own, position));
  const band = expected === null ? [] : run.bandSteps.map((step, position) => [step, expected.value(own, position), width.value(own, position)]);
  return { values, band };
}

async function drawCurves() {
  const mine = ++charting, { run: at, kind, layer, head } = now, run = RUNS[at], parent = byId("curves");
  const [name, index, keys, queries] = run.layers[layer];
  const label = labelOf(run, kind, layer, head);
  const heading = make("h3", `${label}: ${kind} head ${head} of layer ${index} (${name}), run ${run.name}`);
  const grid = make("div", null, { class: "charts" });
  const room = Math.max(300, parent.clientWidth);
  const columns = Math.max(1, Math.floor((room + 16) / 440)), width = Math.floor((room - 16 * (columns - 1)) / columns) - 2;
  const marks = alertsOf(run, kind, layer, head);
  const spans = run.spans.filter((span) => span[0] === kind && span[1] === layer && span[2] === head)
    .map(([, , , from, to]) => [run.steps[from], run.steps[to]]);
  const rows = run.statistics.map((row, position) => [row, position]).filter(([row]) => row.kind === kind);
  // The statistic that was asked for comes first.
  rows.sort(([one], [other]) => (other.name === now.statistic) - (one.name === now.statistic));
  const made = [];
  for (const [row, position] of rows) {
    const { values, band } = await curvesOf(at, position, kind, layer, head);
    const series = [{ steps: run.steps, values: row.median.map((value) => value ?? NaN), className: "median", name: "median of all heads" }];
    for (let other = 0, colour = 0; other < RUNS.length; other++) {
      const same = RUNS[other].layers[layer], there = statisticOf(RUNS[other], row.name);
      if (other === at || there < 0 || !same || head >= same[kind === "key" ? 2 : 3] || colour >= OTHERS.length) continue;
      const found = await curvesOf(other, there, kind, layer, head);
      series.push({ steps: RUNS[other].steps, values: found.values, className: OTHERS[colour++], name: RUNS[other].name });
    }
    series.push({ steps: run.steps, values, className: "own", name: RUNS.length > 1 ? run.name : "this head" });
    made.push({
      title: `${row.title}, ${label}, run ${run.name}`, unit: row.unit, series, band, spans,
      note: row.judged ? "" : "Recorded, not judged: it has no baseline",
      marks: marks.map((alert) => ({ ...alert, own: alert.statistic === row.name, text: `${alert.severity} alert at step ${alert.step}: ${alert.statistic}` })),
    });
  }
  // The loss is often told less often than samples are taken.
  const told = run.losses.flatMap((loss, position) => (loss === null ? [] : [position]));
  if (told.length) {
    const series = [{ steps: told.map((each) => run.steps[each]), values: told.map((each) => run.losses[each]), className: "own", name: "loss" }];
    made.push({ title: `loss, run ${run.name}`, unit: "loss", series, band: [], spans: [], marks: [], note: "" });
  }
  if (mine !== charting) return;
  charts = made.map((each) => chart({ ...each, width, onStep: goTo }));
  grid.append(...charts.map(({ figure }) => figure));
  const partners = make("p", kind === "key" ? "Paired query heads: " : "Its key head: ", { class: "partners" });
  const paired = kind === "key"
    ? Array.from({ length: queries }, (_, query) => query).filter((query) => Math.floor((query * keys) / queries) === head)
    : [Math.floor((head * keys) / queries)];
  const partner = kind === "key" ? "query" : "key";
  for (const other of paired) {
    partners.append(make("a", labelOf(run, partner, layer, other), {
      href: "#head", "data-run": at, "data-kind": partner, "data-layer": layer, "data-head": other,
    }), " ");
  }
  const legend = make("p", null, { class: "legend" });
  const shown = [["own", RUNS.length > 1 ? `run ${run.name}` : "this head"], ["median", "median of all heads"], ["band", "baseline band"], ["onset", "from onset to alert"], ["under", "under alert"]];
  RUNS.filter((each) => each !== run).slice(0, OTHERS.length).forEach((each, number) => shown.push([OTHERS[number], `same head, run ${each.name}`]));
  for (const [className, text] of shown) legend.append(make("span", "", { class: `key ${className}`, "aria-hidden": "true" }), make("span", text));
  if (RUNS.length > OTHERS.length + 1) legend.append(make("span", `(of ${RUNS.length - 1} other runs the first ${OTHERS.length} are drawn)`));
  parent.replaceChildren(heading, legend, grid, partners);
  charts.forEach(({ show }) => show(now.step));
}

function goTo(step) {
  const at = positionAt(ALL_STEPS, Math.round(step));
  byId("step").value = at;
  setStep(at);
}

function setStep(at) {
  now.step = ALL_STEPS[at];
  byId("step-shown").textContent = `${now.step} (${at + 1} of ${ALL_STEPS.length})`;
  byId("step").setAttribute("aria-valuetext", `step ${now.step}`);
  drawMaps();
  charts.forEach(({ show }) => show(now.step));
}

function setStatistic(name) {
  now.statistic = byId("statistic").value = name;
  const row = rowNow();
  byId("meaning").textContent = now.mode === "drift"
    ? `${row.title}: evidence of drift from the head's own baseline, in units of the threshold at which alerts are raised: white on the baseline, red above, blue below.`
    : `${row.title} (${row.unit}), a ${row.kind} head's. High: ${row.high}. Low: ${row.low}.`;
}

function begin() {
  const names = new Map(RUNS.flatMap((run) => run.statistics).map((row) => [row.name, row.title]));
  for (const [name, title] of names) byId("statistic").append(make("option", title, { value: name }));
  const step = byId("step");
  step.max = ALL_STEPS.length - 1;
  step.value = ALL_STEPS.length - 1;
  const first = document.querySelector("#ranking [data-head]");
  const told = RUNS.flatMap((run) => run.alerts)[0];
  setStatistic((first && first.dataset.name) || (told && told.statistic) || names.keys().next().value);
  now.kind = kindNow();
  if (first) take(first);
  step.addEventListener("input", () => setStep(Number(step.value)));
  byId("statistic").addEventListener("change", (event) => {
    setStatistic(event.target.value);
    drawMaps();
  });
  byId("mode").addEventListener("change", (event) => {
    now.mode = event.target.value;
    setStatistic(now.statistic);
    drawMaps();
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-head]");
    if (!link) return;
    take(link);
    drawMaps();
    drawCurves();
  });
  let waiting = 0;
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { drawMaps(); drawCurves(); }, 150);
  });
  for (const query of ["(prefers-color-scheme: dark)"]) matchMedia(query).addEventListener("change", () => drawMaps());
  setStep(ALL_STEPS.length - 1);
  drawCurves().then(() => document.body.setAttribute("data-ready", ""));
}

function take(link) {
  const { run, kind, layer, head, name } = link.dataset;
  Object.assign(now, { run: Number(run), kind, layer: Number(layer), head: Number(head) });
  if (name) setStatistic(name);
}

if (typeof DecompressionStream === "undefined") {
  byId("maps").append(make("p", "This browser is too old for the maps and curves: it needs DecompressionStream (any of 2023 or later)."));
} else {
  begin();
}
