"use strict";
// The map of one run: layers x heads at one step.

const LEFT = 48, TOP = 12, RIGHT = 132, BOTTOM = 44;

// Places of the cells for a width in pixels; square cells would leave large models no room.
function gridOf(run, kind, width) {
  const columns = Math.max(1, ...run.layers.map((layer) => layer[kind === "key" ? 2 : 3]));
  const rows = Math.max(1, run.layers.length);
  const wide = Math.min(56, (width - LEFT - RIGHT) / columns);
  const high = Math.min(36, Math.max(4, 480 / rows));
  return {
    columns, rows, wide, high,
    x: (column) => LEFT + Math.round(column * wide),
    y: (row) => TOP + Math.round(row * high),
    at: (x, y) => [Math.floor((y - TOP) / high), Math.floor((x - LEFT) / wide)],
    height: TOP + Math.max(Math.round(rows * high), 96) + BOTTOM,
  };
}

// What colours span: of values the 1st to the 99th percentile over all runs and steps shown, of drift one threshold.
function scaleOf(mode, name) {
  if (mode === "drift") return { low: -1, high: 1, logarithmic: false };
  const rows = RUNS.map((run) => run.statistics[statisticOf(run, name)]).filter((row) => row);
  let low = Math.min(...rows.map((row) => row.range[0])), high = Math.max(...rows.map((row) => row.range[1]));
  const least = Math.min(...rows.filter((row) => row.least > 0).map((row) => row.least));
  if (low <= 0 && Number.isFinite(least)) low = Math.min(least, high);
  if (high - low < 1e-9 * Math.abs(high)) [low, high] = [low * 0.5, high * 1.5 || 1];
  return { low, high, logarithmic: low > 0 && high / low > 30 };
}

function share(value, scale) {
  const at = scale.logarithmic
    ? Math.log(value / scale.low) / Math.log(scale.high / scale.low)
    : (value - scale.low) / (scale.high - scale.low);
  return Math.min(1, Math.max(0, at));
}

function drawMap(canvas, run, view) {
  const { kind, mode, scale, valueAt, framed, chosen, unit } = view;
  const width = canvas.parentElement.clientWidth, grid = gridOf(run, kind, width), dots = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * dots);
  canvas.height = Math.round(grid.height * dots);
  canvas.style.height = `${grid.height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(dots, dots);
  pen.fillStyle = GREY;
  pen.fillRect(grid.x(0), grid.y(0), grid.x(grid.columns) - grid.x(0), grid.y(grid.rows) - grid.y(0));
  const colours = PALETTES[mode];
  for (let row = 0; row < run.layers.length; row++) {
    for (let column = 0; column < run.layers[row][kind === "key" ? 2 : 3]; column++) {
      const value = valueAt(row, column);
      if (Number.isNaN(value)) continue;
      pen.fillStyle = colours[Math.round(255 * share(value, scale))];
      const x = grid.x(column), y = grid.y(row);
      pen.fillRect(x, y, grid.x(column + 1) - x, grid.y(row + 1) - y);
    }
  }
  const words = getComputedStyle(canvas).color;
  drawAxes(pen, run, grid, kind, words);
  drawBar(pen, grid, { mode, scale, unit, words, colours });
  for (const [row, column] of framed) frame(pen, grid, row, column, 0, []);
  // Around the frame of a head under alert, so that neither hides the other.
  if (chosen) frame(pen, grid, chosen[0], chosen[1], 4, [3, 3]);
}

function frame(pen, grid, row, column, outside, dashes) {
  const least = 7, x = grid.x(column), y = grid.y(row);
  const wide = Math.max(grid.x(column + 1) - x, least), high = Math.max(grid.y(row + 1) - y, least);
  const left = x - (wide - (grid.x(column + 1) - x)) / 2, top = y - (high - (grid.y(row + 1) - y)) / 2;
  for (const [colour, thick, dashed] of [["white", 4, []], ["black", 1.8, dashes]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = thick;
    pen.setLineDash(dashed);
    pen.strokeRect(left - outside, top - outside, wide + 2 * outside, high + 2 * outside);
  }
  pen.setLineDash([]);
}

// Every so many-th label, so that none touches the next.
function every(least, size) {
  return [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 200, 500].find((each) => each * size >= least) || 1000;
}

function drawAxes(pen, run, grid, kind, words) {
  pen.fillStyle = words;
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  const rows = every(14, grid.high), columns = every(24, grid.wide);
  for (let row = 0; row < run.layers.length; row += rows) {
    pen.fillText(run.layers[row][1], LEFT - 6, (grid.y(row) + grid.y(row + 1)) / 2);
  }
  pen.textAlign = "center";
  pen.textBaseline = "top";
  const bottom = grid.y(grid.rows);
  for (let column = 0; column < grid.columns; column += columns) {
    pen.fillText(column, (grid.x(column) + grid.x(column + 1)) / 2, bottom + 5);
  }
  pen.textAlign = "left";
  pen.fillText(`${kind} head`, LEFT, bottom + 22);
  pen.save();
  pen.translate(4, Math.max(grid.y(grid.rows), 52));
  pen.rotate(-Math.PI / 2);
  pen.fillText("layer", 0, 0);
  pen.restore();
}

function drawBar(pen, grid, { mode, scale, unit, words, colours }) {
  const x = grid.x(grid.columns) + 18, high = Math.max(grid.y(grid.rows) - TOP, 96), wide = 14;
  for (let line = 0; line < high; line++) {
    pen.fillStyle = colours[Math.round(255 * (1 - line / (high - 1)))];
    pen.fillRect(x, TOP + line, wide, 1);
  }
  pen.fillStyle = words;
  pen.textAlign = "left";
  pen.textBaseline = "middle";
  for (const at of [0, 0.5, 1]) {
    const value = scale.logarithmic
      ? scale.low * (scale.high / scale.low) ** at
      : scale.low + (scale.high - scale.low) * at;
    const y = TOP + (1 - at) * high, end = at === 1 ? 5 : at === 0 ? -5 : 0;
    pen.fillText(number(value), x + wide + 5, y + end);
  }
  pen.textBaseline = "top";
  pen.fillText(mode === "drift" ? "thresholds" : unit, x, TOP + high + 5);
  if (scale.logarithmic) pen.fillText("log scale", x, TOP + high + 20);
}
