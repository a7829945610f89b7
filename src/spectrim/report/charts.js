// Charts: lines or dots by uPlot (uplot.js), with its crosshair and zoom. Ours are marks, error bars, shapes, keys and the switch of the axis.
// A figure keeps its chart: figure.chart is the uPlot, figure.chart.data what it shows.

const SHAPES = [
  (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`,
  (x, y, r) => `M${x} ${y - r}L${x + r} ${y + r}L${x - r} ${y + r}Z`,
  (x, y, r) => `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}Z`,
  (x, y, r) => `M${x} ${y - r}L${x + r} ${y}L${x} ${y + r}L${x - r} ${y}Z`,
  (x, y, r) => `M${x - r} ${y - r}L${x + r} ${y - r}L${x} ${y + r}Z`,
];
const GLYPHS = ["●", "▲", "■", "◆", "▼"];
const HEIGHT = 230; // CSS pixels of the plot with its axes

const logs = new Map(); // what the reader chose for a chart, by its title: charts are drawn again when ranks change
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const hue = (index) => color(COLORS[index % 6].slice(4, -1));
const everyChart = () => [...document.querySelectorAll("figure")].map((figure) => figure.chart).filter(Boolean);

new MutationObserver(() => everyChart().forEach((one) => one.redraw(false, true))).observe(document.documentElement, { attributeFilter: ["data-theme"] });
addEventListener("resize", () => everyChart().forEach((one) => one.setSize({ width: one.root.parentNode.clientWidth, height: HEIGHT })));

// series: [{name, points: [[x, y, label?]], dots}], a point with `gap` begins a new line, one with `error` has a bar;
// marks: [{x, label, hint?}], those with a hint as solid lines
function chart(parent, options) {
  const key = options.title.split(" of ")[0];
  const figure = add(parent, "figure");
  const draw = (log) => {
    figure.replaceChildren();
    add(figure, "figcaption", {}, options.title);
    return drawn(figure, { ...options, log }) && switchable(options) && scaleSwitch(figure, log, (next) => { logs.set(key, next); draw(next); });
  };
  draw(logs.get(key) ?? Boolean(options.log));
  if (!figure.chart) figure.remove(); // a single point is no chart
}

// Whether the other axis shows something: values of both signs, or within a factor of ten, stay linear.
function switchable({ series, zero, log }) {
  const values = series.flatMap((one) => one.points.map((p) => p[1])).filter(Number.isFinite);
  return log || (!zero && Math.min(...values) > 0 && Math.max(...values) > 10 * Math.min(...values));
}

function scaleSwitch(figure, log, change) {
  const made = add(figure, "button", { type: "button", class: "scale", "aria-pressed": String(log), "aria-label": "logarithmic axis" }, "log");
  made.addEventListener("click", () => { change(!log); figure.querySelector(".scale")?.focus(); });
}

// The series on their common places, as uPlot wants them: undefined where a series has no point, null where its line is interrupted.
function aligned(shown) {
  const breaks = shown.flatMap((one) => one.points.filter((p, index) => index && p.gap).map((p) => p[0] - 1e-6));
  const places = [...new Set([...shown.flatMap((one) => one.points.map((p) => p[0])), ...breaks])].sort((a, b) => a - b);
  const columns = shown.map((one) => {
    const held = new Map(one.points.map((p) => [p[0], p[1]]));
    return places.map((place) => (held.has(place) ? held.get(place) : breaks.includes(place) ? null : undefined));
  });
  return [places, ...columns];
}

// Draw a chart into a figure; returns whether there was more than one place to draw.
function drawn(figure, { title, series, marks = [], log = false, x = "", zero = false }) {
  const known = series.map((one) => ({ ...one, points: one.points.filter((p) => Number.isFinite(p[1]) && (!log || p[1] > 0)) }));
  const shown = known.filter((one) => one.points.length);
  const points = shown.flatMap((one) => one.points);
  if (!points.length || new Set(points.map((p) => p[0])).size < 2) return false;
  const xs = [...points.map((p) => p[0]), ...marks.map((mark) => mark.x)];
  const pad = shown.some((one) => one.dots) ? 0.06 * (Math.max(...xs) - Math.min(...xs)) : 0;
  const whole = [Math.min(...xs) - pad, Math.max(...xs) + pad];
  const ends = [Math.min(...points.map((p) => p[0])), Math.max(...points.map((p) => p[0]))];
  const axis = { stroke: () => color("--soft"), font: "11px system-ui, sans-serif", grid: { stroke: () => color("--line"), width: 1 }, ticks: { show: false } };
  const powers = (plot, splits) => (plot.scales.y.max < 30 * plot.scales.y.min ? splits : splits.map((one) => (Math.abs(Math.log10(one) % 1) < 1e-9 ? one : null)));
  const values = (_, splits) => splits.map((value) => (value === null ? "" : brief(value)));
  const line = (one, index) => ({
    label: one.dots ? `${GLYPHS[index % GLYPHS.length]} ${one.name}` : one.name,
    stroke: () => hue(index), width: 2, dash: DASHES[index % 6].split(" ").filter(Boolean).map(Number),
    paths: one.dots ? () => null : undefined,
    points: { show: !one.dots && one.points.length < 40, size: 5, fill: () => hue(index) },
    value: (_, value) => (typeof value === "number" ? brief(value) : ""),
  });
  const made = new uPlot({
    width: figure.clientWidth - 22 || 418, height: HEIGHT,
    scales: {
      x: { time: false, range: (_, low, high) => (low === ends[0] && high === ends[1] ? whole : [low, high]) },
      y: { distr: log ? 3 : 1, range: (_, low, high) => upright(low, high, points, { log, zero }) },
    },
    axes: [{ ...axis, grid: { show: false }, label: x, labelFont: axis.font, labelSize: 16, size: 26, values }, { ...axis, grid: { ...axis.grid, ...(log ? { filter: powers } : {}) }, size: 52, values }],
    series: [{ label: x.split(",")[0] || "x", value: (_, value) => (value === null ? "" : brief(value)) }, ...shown.map(line)],
    legend: { markers: { fill: (_, index) => COLORS[(index - 1) % 6], stroke: (_, index) => COLORS[(index - 1) % 6] } },
    cursor: { y: false, drag: { x: true, y: false } },
    hooks: { draw: [(plot) => shapes(plot, shown), (plot) => overlay(plot, shown, marks)] },
  }, aligned(shown), figure);
  figure.chart = made;
  made.over.setAttribute("role", "img");
  made.over.setAttribute("aria-label", `${title}: ${shown.map((one) => one.name).join(", ")}`);
  keys(made);
  return true;
}

// The range of the y axis: the bars inside, a little room, and zero where it belongs to the picture.
function upright(low, high, points, { log, zero }) {
  if (low === null) return [0, 1];
  if (log) return low === high ? [low / 2, high * 2] : [low / 1.2, high * 1.2];
  const inside = points.filter((p) => p.error && p[1] >= low && p[1] <= high);
  let [y0, y1] = [Math.min(low, ...inside.map((p) => p[1] - p.error)), Math.max(high, ...inside.map((p) => p[1] + p.error))];
  if (zero) y0 = Math.min(0, y0);
  const room = y0 === y1 ? Math.abs(y0 || 1) * 0.05 : (y1 - y0) * 0.05;
  return [zero ? y0 : y0 - room, y1 + room];
}

// Dots of different shapes, so that they differ in more than color.
function shapes(plot, shown) {
  const ratio = devicePixelRatio || 1;
  shown.forEach((one, index) => {
    if (!one.dots) return;
    for (const [x, y] of one.points) {
      const path = new Path2D(SHAPES[index % SHAPES.length](plot.valToPos(x, "x", true), plot.valToPos(y, "y", true), 6 * ratio));
      plot.ctx.fillStyle = hue(index);
      plot.ctx.fill(path);
    }
  });
}

// Marks, error bars and the names of dots, as elements above the plot.
function overlay(plot, shown, marks) {
  plot.over.querySelectorAll(".mark, .error, .dot").forEach((one) => one.remove());
  const [width, height] = [plot.over.clientWidth, plot.over.clientHeight];
  const inside = (place) => place >= -1 && place <= width + 1;
  marks.forEach((mark, index) => {
    const left = plot.valToPos(mark.x, "x");
    if (!inside(left)) return;
    const end = left > width * 0.7 ? " end" : "";
    const made = add(plot.over, "div", { class: `mark${mark.hint ? " step" : ""}${end}`, style: `left: ${left}px`, title: mark.hint, "data-x": mark.x });
    add(made, "span", { style: `top: ${11 * (index % 3)}px` }, mark.label);
  });
  shown.forEach((one, index) => {
    for (const p of one.points) {
      const [left, top] = [plot.valToPos(p[0], "x"), plot.valToPos(p[1], "y")];
      if (!inside(left) || !(p.error || one.dots)) continue;
      const half = p.error ? plot.valToPos(p[1] - p.error, "y") - top : 0;
      if (half > 0) add(plot.over, "div", { class: "error", style: `left: ${left}px; top: ${top - half}px; height: ${2 * half}px; background: ${COLORS[index % 6]}` });
      if (one.dots) add(plot.over, "div", { class: "dot", style: `left: ${left}px; top: ${Math.min(height, top)}px`, title: `${one.name}${p[2] ? `, ${p[2]}` : ""}: ${brief(p[0])}, ${brief(p[1])}` });
    }
  });
}

// The arrow keys move the crosshair from place to place.
function keys(plot) {
  const places = plot.data[0].map((_, index) => index).filter((index) => plot.data.slice(1).some((column) => typeof column[index] === "number"));
  let at = -1;
  const hide = () => { at = -1; plot.setCursor({ left: -10, top: -10 }); };
  plot.over.setAttribute("tabindex", "0");
  plot.over.addEventListener("blur", hide);
  plot.over.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    at = Math.max(0, Math.min(places.length - 1, at < 0 ? (step > 0 ? 0 : places.length - 1) : at + step));
    plot.setCursor({ left: plot.valToPos(plot.data[0][places[at]], "x"), top: 0 });
  });
}
