// Charts: lines or dots in SVG, with a crosshair that reads all lines at one place, and a switch between linear and logarithmic axes.
// SVG and not a canvas library: text stays text for screen readers and print, and a page stays small.

function ticks(low, high, log) {
  if (log) {
    const [first, last] = [Math.ceil(low - 1e-9), Math.floor(high + 1e-9)];
    const every = Math.max(1, Math.ceil((last - first) / 5));
    const found = [];
    for (let power = first; power <= last; power += every) found.push(power);
    if (found.length > 1) return found;
    const steps = [1, 1.5, 2, 3, 5, 7].flatMap((step) => [first - 1, first].map((power) => power + Math.log10(step)));
    const inside = steps.filter((place) => place >= low && place <= high).sort((a, b) => a - b);
    return inside.length > 1 ? inside : [low, high];
  }
  const rough = (high - low) / 4 || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * unit).find((size) => size >= rough);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) found.push(+value.toPrecision(10));
  return found;
}

const logs = new Map(); // what the reader chose for a chart, by its title: charts are drawn again when ranks change

// series: [{name, points: [[x, y, label?]], dots}]; marks: [{x, label, hint?}], those with a hint as solid lines
function chart(parent, options) {
  const key = options.title.split(" of ")[0];
  const figure = add(parent, "figure");
  const draw = (log) => {
    figure.replaceChildren();
    add(figure, "figcaption", {}, options.title);
    return drawn(figure, { ...options, log }) && switchable(options) && scaleSwitch(figure, log, (next) => { logs.set(key, next); draw(next); });
  };
  draw(logs.get(key) ?? Boolean(options.log));
  if (!figure.querySelector("svg")) figure.remove(); // a single point is no chart
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

// Read the lines at the place of the pointer, or with the arrow keys: a vertical line, and the values below.
function crosshair(figure, svg, shown, { px, x, top, foot }) {
  const places = [...new Set(shown.flatMap((one) => one.points.map((p) => p[0])))].sort((a, b) => a - b);
  const line = add(svg, "line", { class: "cross", y1: top, y2: foot, visibility: "hidden" });
  const read = add(figure, "div", { class: "read", "aria-live": "polite" }, "\u00a0");
  let at = -1;
  const show = (index) => {
    at = Math.max(0, Math.min(places.length - 1, index));
    const place = places[at];
    for (const [name, value] of [["x1", px(place)], ["x2", px(place)], ["visibility", "visible"]]) line.setAttribute(name, value);
    const found = shown.map((one) => [one.name, one.points.find((p) => p[0] === place)]).filter(([, p]) => p);
    read.textContent = [`${x.split(",")[0] || "x"} ${brief(place)}`, ...found.map(([name, p]) => `${name} ${brief(p[1])}`)].join(" · ");
  };
  const hide = () => { at = -1; line.setAttribute("visibility", "hidden"); read.textContent = "\u00a0"; };
  svg.setAttribute("tabindex", "0");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const here = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    show(places.reduce((best, place, index) => (Math.abs(px(place) - here) < Math.abs(px(places[best]) - here) ? index : best), 0));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(at < 0 ? (step > 0 ? 0 : places.length - 1) : at + step);
  });
}

// Draw a chart into a figure; returns whether there was more than one place to draw.
function drawn(figure, { title, series, marks = [], log = false, x = "", y = "", zero = false }) {
  const shown = series.map((one) => ({ ...one, points: one.points.filter((p) => Number.isFinite(p[1]) && (!log || p[1] > 0)) }));
  const points = shown.flatMap((one) => one.points);
  if (!points.length || new Set(points.map((p) => p[0])).size < 2) return false;
  const [W, H, left, right, top, bottom] = [440, 230, 52, 10, 14, 34];
  const scale = (value) => (log ? Math.log10(value) : value);
  const xs = [...points.map((p) => p[0]), ...marks.map((mark) => mark.x)];
  let [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  const [below, above] = [(p) => (log ? p[1] : p[1] - (p.error || 0)), (p) => p[1] + (p.error || 0)];
  let [y0, y1] = [Math.min(...points.map((p) => scale(below(p)))), Math.max(...points.map((p) => scale(above(p))))];
  if (zero) y0 = Math.min(0, y0);
  if (x0 === x1) [x0, x1] = [x0 - 0.5, x1 + 0.5];
  if (y0 === y1) [y0, y1] = [y0 - Math.abs(y0 || 1) * 0.05, y1 + Math.abs(y1 || 1) * 0.05];
  const [padX, padY] = [shown.some((one) => one.dots) ? (x1 - x0) * 0.06 : 0, (y1 - y0) * 0.05];
  [x0, x1, y0, y1] = [x0 - padX, x1 + padX, y0 - (zero ? 0 : padY), y1 + padY];
  const px = (value) => left + ((value - x0) / (x1 - x0)) * (W - left - right);
  const py = (value) => H - bottom - ((value - y0) / (y1 - y0)) * (H - top - bottom);
  const svg = add(figure, "svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}: ${shown.map((one) => one.name).join(", ")}` });
  for (const value of ticks(y0, y1, log)) {
    add(svg, "line", { class: "grid", x1: left, x2: W - right, y1: py(value), y2: py(value) });
    add(svg, "text", { x: left - 6, y: py(value) + 4, "text-anchor": "end" }, brief(log ? 10 ** value : value));
  }
  for (const value of ticks(x0, x1, false)) add(svg, "text", { x: px(value), y: H - bottom + 14, "text-anchor": "middle" }, brief(value));
  add(svg, "text", { x: (left + W - right) / 2, y: H - 4, "text-anchor": "middle" }, x);
  if (y) add(svg, "text", { x: 4, y: 10 }, y);
  for (const mark of marks) {
    const line = add(svg, "line", { class: mark.hint ? "mark step" : "mark", x1: px(mark.x), x2: px(mark.x), y1: top, y2: H - bottom });
    if (mark.hint) add(line, "title", {}, mark.hint);
  }
  marks.forEach((mark, index) => {
    const end = px(mark.x) > W * 0.7;
    add(svg, "text", { x: px(mark.x) + (end ? -3 : 3), y: top + 9 + 11 * (index % 3), "text-anchor": end ? "end" : "start" }, mark.label);
  });
  shown.forEach((one, index) => {
    const [color, dash] = [COLORS[index % 6], DASHES[index % 6]];
    if (!one.dots) {
      const path = one.points.map((p, i) => `${i && !p.gap ? "L" : "M"}${px(p[0]).toFixed(1)} ${py(scale(p[1])).toFixed(1)}`).join("");
      add(svg, "path", { d: path, fill: "none", stroke: color, "stroke-width": 2, "stroke-dasharray": dash });
    }
    if (one.dots || one.points.length < 40) {
      for (const p of one.points) {
        const place = { fill: color, stroke: "var(--panel)" };
        const [cx, cy, r] = [px(p[0]), py(scale(p[1])), one.dots ? 6 : 2.5];
        if (p.error) add(svg, "line", { x1: cx, x2: cx, y1: py(scale(below(p))), y2: py(scale(above(p))), stroke: color, "stroke-width": 1.5 });
        const dot = one.dots ? add(svg, "path", { ...place, d: SHAPES[index % SHAPES.length](cx, cy, r) }) : add(svg, "circle", { ...place, cx, cy, r });
        add(dot, "title", {}, `${one.name}${p[2] ? `, ${p[2]}` : ""}: ${brief(p[0])}, ${brief(p[1])}`);
      }
    }
  });
  crosshair(figure, svg, shown, { px, x, top, foot: H - bottom });
  const legend = add(figure, "div", { class: "legend" });
  shown.forEach((one, index) => {
    if (!one.points.length) return;
    const item = add(legend, "span");
    const key = add(item, "svg", { viewBox: "0 0 22 10", "aria-hidden": "true" });
    if (one.dots) add(key, "path", { fill: COLORS[index % 6], d: SHAPES[index % SHAPES.length](11, 5, 5) });
    else add(key, "line", { x1: 0, x2: 22, y1: 5, y2: 5, stroke: COLORS[index % 6], "stroke-width": 2.5, "stroke-dasharray": DASHES[index % 6] });
    item.append(one.name);
  });
  return true;
}

const SHAPES = [
  (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`,
  (x, y, r) => `M${x} ${y - r}L${x + r} ${y + r}L${x - r} ${y + r}Z`,
  (x, y, r) => `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}Z`,
  (x, y, r) => `M${x} ${y - r}L${x + r} ${y}L${x} ${y + r}L${x - r} ${y}Z`,
  (x, y, r) => `M${x - r} ${y - r}L${x + r} ${y - r}L${x} ${y + r}Z`,
];
