// Plain JavaScript, behind uplot.js, knapsack.js and charts.js. Data: the JSON in #data, written by spectrim/report/data.py.
const DATA = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["var(--c0)", "var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)"];
const DASHES = ["", "6 3", "2 2", "9 3 2 3", "12 3", "1 3"]; // lines differ in more than color

// Elements and numbers

function add(parent, tag, attributes = {}, ...children) {
  const svg = parent.namespaceURI === "http://www.w3.org/2000/svg" || tag === "svg";
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  parent.append(node);
  return node;
}

const whole = (value) => Math.round(value).toLocaleString("en-US");
const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)} %`;
const milliseconds = (value) => `${(1000 * value).toFixed(3)} ms`;

function brief(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)}G`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return size >= 1e-3 ? String(+value.toPrecision(3)) : value.toExponential(0);
}

function table(parent, titles, rows, words = []) {
  const made = add(add(parent, "div", { class: "scroll", tabindex: "0", role: "region", "aria-label": titles.filter(Boolean).join(", ") }), "table");
  const kind = (index) => (words.includes(index) ? "words" : null);
  const head = add(add(made, "thead"), "tr");
  titles.forEach((title, index) => add(head, "th", { scope: "col", class: kind(index) }, title));
  const body = add(made, "tbody");
  for (const row of rows) {
    const line = add(body, "tr");
    row.forEach((cell, index) => add(line, "td", { class: kind(index) }, cell));
  }
  return made;
}

// A plan, unpacked

function floats(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return Array.from(new Float32Array(bytes.buffer));
}

function unpack(weight) {
  const [first, step, count, last] = weight.ranks;
  const ranks = first ? [...Array(count).keys()].map((index) => first + index * step).concat(last) : weight.ranks.slice(1);
  const costs = (packed) => {
    if (!packed) return ranks.map(() => 0);
    return packed[0] < 0 ? packed.slice(1) : ranks.map((rank, index) => (index + 1 < ranks.length ? packed[0] * rank : packed[1]));
  };
  const distortions = Object.fromEntries(Object.entries(weight.distortions).map(([name, text]) => [name, floats(text)]));
  const params = costs(weight.params);
  const bytes = params.map((count) => count * weight.bytes);
  return { ...weight, ranks, distortions, macs: costs(weight.macs), params, bytes, seconds: costs(weight.seconds) };
}

const PLAN = DATA.plan && { ...DATA.plan, weights: DATA.plan.weights.map(unpack) };
const KINDS = { macs: "MACs", params: "parameters", bytes: "bytes", seconds: "latency" };
const FIELDS = { macs: "macs", params: "params", bytes: "size_bytes", seconds: "latency_s" };

// What the whole network costs where each weight takes one of its choices.
function totals(picks) {
  const each = (name) => PLAN.weights.reduce((total, weight, index) => total + weight[name][picks[index]], 0);
  return Object.fromEntries(Object.keys(KINDS).map((kind) => [kind, fixedOf(kind) + each(kind)]));
}

const denseOf = (kind) => PLAN.dense[FIELDS[kind]];
const fixedOf = (kind) => PLAN.fixed[FIELDS[kind]] || 0;

// pins: {name: place in the weight's ranks}. Returns null where no ranks meet the budget.
function allocate(kind, fraction, importance, pins = {}) {
  const all = frontiers(kind, importance);
  const items = PLAN.weights.map((weight, index) => {
    const pin = pins[weight.name];
    return pin === undefined ? all[index] : { ...frontier([weight[kind][pin]], [weight.distortions[importance][pin]]), I: [pin] };
  });
  const most = kind === "seconds" ? fraction * denseOf(kind) * (1 + 1e-12) : Math.floor(fraction * denseOf(kind) + 1e-9);
  return knapsack(items, most - fixedOf(kind));
}

const known = {};

function frontiers(kind, importance) {
  const key = `${kind} ${importance}`;
  if (!known[key]) known[key] = PLAN.weights.map((weight) => frontier(weight[kind], weight.distortions[importance]));
  return known[key];
}

function smallest(kind, pins = {}) {
  const least = PLAN.weights.map((weight) => (pins[weight.name] === undefined ? Math.min(...weight[kind]) : weight[kind][pins[weight.name]]));
  return (fixedOf(kind) + least.reduce((a, b) => a + b, 0)) / denseOf(kind);
}

// The mapping that `prune` and the recipe's `prune.ranks` take. Names in JSON's quotes, which are YAML's: "0" is no number there.
function yaml(picks) {
  const lines = PLAN.weights.map((weight, index) => `    ${JSON.stringify(weight.name)}: ${JSON.stringify(sizeOf(weight, picks[index]))}`);
  return `prune:\n  ranks:\n${lines.join("\n")}\n`;
}

// The same as a call of `prune`.
function python(picks) {
  const tuple = (size) => (Array.isArray(size) ? `(${size.join(", ")})` : size);
  const lines = PLAN.weights.map((weight, index) => `    ${JSON.stringify(weight.name)}: ${tuple(sizeOf(weight, picks[index]))},`);
  const schemes = [...new Set(PLAN.weights.filter((weight) => /Conv/.test(weight.kind)).map((weight) => weight.scheme))];
  const scheme = schemes.length === 1 ? `, ${JSON.stringify(schemes[0])}` : "";
  return `low = sp.factorize(model${scheme})\nsmall = sp.merge(sp.prune(low, {\n${lines.join("\n")}\n}))\n`;
}

// Verdict

// The verdict in three parts, what to watch, and what to try: cards of what run.verdict says.
function hero(parent, verdict) {
  const cards = add(parent, "div", { class: "hero" });
  for (const text of [verdict.size, verdict.speed, verdict.quality].filter(Boolean)) {
    const [, head, rest] = text.match(/^([^(]*?)\s*(?:\((.*)\))?$/s);
    const bad = /slower|larger|(Accuracy|Loss) .*(lower|higher)/.test(head) && !/points higher|^Loss .*lower/.test(head);
    const level = /level|not measurabl|As large/.test(head);
    const card = add(cards, "div", { class: `card ${bad ? "bad" : level ? "level" : "good"}` });
    add(card, "strong", {}, head);
    if (rest) add(card, "span", { class: "soft" }, rest);
  }
  verdict.warnings.forEach((text) => add(parent, "p", { class: "warning", role: "note" }, `Warning: ${text}.`));
  add(parent, "p", {}, `Next: ${verdict.next}.`);
}

function overview(parent) {
  const run = DATA.run;
  if (run && run.verdict) hero(parent, run.verdict);
  for (const [name, verdict] of Object.entries((run && run.verdicts) || {})) {
    add(parent, "h3", {}, name);
    hero(parent, verdict);
  }
  if (DATA.shortfalls.length) {
    const box = add(parent, "div", { class: "short", role: "note" });
    add(box, "strong", {}, "What fell short");
    const list = add(box, "ul");
    DATA.shortfalls.forEach((line) => add(list, "li", {}, line));
  }
  if (run && Object.keys(run.measured).length) compared(add(parent, "div", { class: "beside" }), run.measured, run.split);
  if (run && (run.coded || []).length) codedBytes(parent, run.coded);
  if (PLAN) budgets(parent);
  settings(parent, run);
}

// Where the bytes of the coded file are: the tensors that take most.
function codedBytes(parent, tensors) {
  const most = 20, part = tensors.slice(0, most), rest = tensors.slice(most);
  const sum = (lines, place) => lines.reduce((total, line) => total + line[place], 0);
  const rows = part.map(([name, data, index]) => [name, whole(Math.round(data)), whole(Math.round(index))]);
  if (rest.length) rows.push([`${rest.length} more`, whole(Math.round(sum(rest, 1))), whole(Math.round(sum(rest, 2)))]);
  add(parent, "h2", {}, "Where the bytes of the coded file are");
  table(parent, ["tensor", "values, bytes", "positions of zeros, bytes"], rows);
}

function compared(pair, measured, split) {
  const parent = add(pair, "div");
  const names = Object.keys(measured);
  const dense = measured.dense || measured[names[0]];
  const ratio = (key) => (m) => (dense[key] && m[key] ? `${(dense[key] / m[key]).toFixed(2)}x` : "");
  const rows = [
    ["accuracy", (m) => m.accuracy !== null && percent(m.accuracy, 2)],
    ["loss", (m) => m.loss !== null && m.loss.toFixed(4)],
    ["MACs", (m) => m.macs !== null && whole(m.macs)],
    ["parameters", (m) => whole(m.params)],
    ["bytes", (m) => whole(m.size_bytes)],
    ["coded file, bytes", (m) => m.coded_bytes && whole(m.coded_bytes)],
    ["values in it, bytes", (m) => m.coded_bytes && whole(m.data_bytes)],
    ["positions of zeros, bytes", (m) => m.coded_bytes && whole(m.index_bytes)],
    ["tiles", (m) => m.tiles && whole(m.tiles)],
    ["tile reads", (m) => m.tile_reads && whole(m.tile_reads)],
    ["latency", (m) => m.latency_s && `${milliseconds(m.latency_s)} ± ${(500 * m.latency_iqr_s).toFixed(3)}`],
    ["MAC reduction", ratio("macs")],
    ["tile reduction", ratio("tiles")],
    ["compression (bytes)", ratio("size_bytes")],
    ["compression (coded file)", (m) => m.coded_bytes && `${(dense.size_bytes / m.coded_bytes).toFixed(2)}x`],
    ["speedup (measured)", ratio("latency_s")],
  ].map(([title, cell]) => [title, ...names.map((name) => cell(measured[name]) || "")]);
  table(parent, ["", ...names], rows.filter((row) => row.slice(1).some(Boolean)));
  if (dense.latency_s) add(parent, "p", { class: "soft" }, `Latency: median ± half the interquartile range; batch ${dense.batch}, CPU threads ${dense.threads}. Accuracy and loss on the ${split}.`);
  tradeOff(add(pair, "div"), measured, dense, dense.accuracy !== null ? "accuracy" : "loss");
}

// Dense, ours and baselines as dots with the standard error of accuracy; budgets that were tried or planned as curves.
function tradeOff(parent, measured, dense, merit) {
  const names = Object.keys(measured).filter((name) => measured[name][merit] !== null);
  const error = (m) => (merit === "accuracy" && m.targets ? Math.sqrt((m.accuracy * (1 - m.accuracy)) / m.targets) : m.loss_error || 0);
  const series = names.map((name) => ({ name, dots: true, points: [Object.assign([measured[name].macs / dense.macs, measured[name][merit]], { error: error(measured[name]) })] }));
  const tried = (DATA.run.tried || []).filter((one) => one[merit] !== undefined && one.budget.macs).map((one) => [one.budget.macs, one[merit], one.kept ? "allowed" : "not allowed"]);
  const sorted = (points) => points.sort((a, b) => a[0] - b[0]);
  if (tried.length > 1) series.push({ name: "tried, validation split", points: sorted(tried) });
  const planned = PLAN && PLAN.dense[merit] !== null ? PLAN.budgets.filter((row) => row.totals).map((row) => [row.totals.macs / PLAN.dense.macs, row.totals[merit]]) : [];
  if (planned.length) series.push({ name: "planned budgets, right after the cut", points: sorted([...planned, [1, PLAN.dense[merit]]]) });
  if (series.flatMap((one) => one.points).length < 2) return;
  chart(parent, { title: `Trade-off: ${merit} against MACs kept`, series, x: "MACs, fraction of dense" });
  if (series.some((one) => one.points.some((p) => p.error))) add(parent, "p", { class: "soft" }, "Bars: one standard error of the split.");
}

function budgets(parent) {
  add(parent, "h3", {}, "The result of each budget right after the cut, without training");
  const rows = PLAN.budgets.map((row) => {
    const name = Object.entries(row.budget).map(([key, value]) => `${key} ${value <= 1 ? percent(value, 0) : whole(value)}`).join(", ");
    return row.totals ? cells(name, row.totals) : [name, `cannot be met: ${row.problem}`];
  });
  const titles = ["budget", "MACs", "parameters", "bytes", "tiles", "tile reads", "latency, predicted", "output error", "loss", "accuracy"];
  const all = [cells("dense", PLAN.dense), ...rows.filter((row) => row.length > 2)];
  const kept = titles.map((_, index) => index).filter((index) => index < 4 || all.some((row) => row[index]));
  table(parent, kept.map((index) => titles[index]), all.map((row) => kept.map((index) => row[index])));
  rows.filter((row) => row.length === 2).forEach((row) => add(parent, "p", {}, row.join(": ")));
  add(parent, "p", { class: "soft" }, `Ranks by ${PLAN.importance}. Training and recalibrated BatchNorm statistics improve on this.`);
  const met = PLAN.budgets.filter((row) => row.totals);
  const curve = (key) => met.map((row) => [row.totals.macs / PLAN.dense.macs, row.totals[key]]);
  const charts = add(parent, "div", { class: "charts" });
  if (met.length > 1) chart(charts, { title: "Output error after the cut", series: [{ name: "relative error", points: curve("output_error") }], x: "MACs, fraction of dense", zero: true });
  if (PLAN.dense.accuracy !== null) chart(charts, { title: "Accuracy after the cut", series: [{ name: "accuracy", points: [...curve("accuracy"), [1, PLAN.dense.accuracy]].sort((a, b) => a[0] - b[0]) }], x: "MACs, fraction of dense" });
}

function cells(name, t) {
  const part = (value, dense) => `${whole(value)} (${percent(value / dense)})`;
  const filled = (value, text) => (value === null ? "" : text(value));
  return [
    name,
    part(t.macs, PLAN.dense.macs),
    part(t.params, PLAN.dense.params),
    part(t.size_bytes, PLAN.dense.size_bytes),
    t.tiles ? part(t.tiles, PLAN.dense.tiles) : "",
    t.tile_reads ? part(t.tile_reads, PLAN.dense.tile_reads) : "",
    filled(t.latency_s, milliseconds),
    filled(t.output_error, (value) => percent(value, 2)),
    filled(t.loss, (value) => value.toFixed(4)),
    filled(t.accuracy, (value) => percent(value, 2)),
  ];
}

function settings(parent, run) {
  const details = add(parent, "details");
  add(details, "summary", {}, "Settings and versions");
  const known = { ...(PLAN ? PLAN.settings : {}), ...(run ? run.environment : {}) };
  const text = (value) => (value !== null && typeof value === "object" ? Object.entries(value).map(([a, b]) => `${a} ${text(b)}`).join(", ") : String(value));
  table(details, ["setting", "value"], Object.entries(known).map(([key, value]) => [key, text(value)]), [1]);
  if (run && run.recipe) add(details, "pre", { tabindex: "0" }, run.recipe);
}

// Rank explorer

const SPARK = { width: 170, height: 38 };

function sparkline(parent, weight) {
  const top = Math.log10(weight.spectrum[0][1] || 1);
  const place = ([rank, value]) => [
    ((rank - 0.5) / weight.held) * SPARK.width,
    2 + Math.min(1, (top - Math.log10(Math.max(value, 1e-30))) / 4) * (SPARK.height - 4),
  ];
  const line = weight.spectrum.map((point) => place(point).map((value) => value.toFixed(1)).join(" ")).join("L");
  const [from] = place(weight.spectrum[0]);
  const [to] = place(weight.spectrum[weight.spectrum.length - 1]);
  const svg = add(parent, "svg", { viewBox: `0 0 ${SPARK.width} ${SPARK.height}`, role: "img", "aria-label": `spectrum of ${weight.name}` });
  add(svg, "path", { class: "under", d: `M${from} ${SPARK.height}L${line}L${to} ${SPARK.height}Z` });
  add(svg, "path", { class: "curve", d: `M${line}` });
  if (weight.breakEven < weight.held) {
    const even = (weight.breakEven / weight.held) * SPARK.width;
    add(svg, "line", { class: "even", x1: even, x2: even, y1: 0, y2: SPARK.height });
  }
  const off = add(svg, "rect", { class: "off", x: 0, y: 0, width: 0, height: SPARK.height });
  const cut = add(svg, "line", { class: "cut", x1: 0, x2: 0, y1: 0, y2: SPARK.height });
  return (rank) => {
    const x = ((rank / weight.held) * SPARK.width).toFixed(1);
    off.setAttribute("x", x);
    off.setAttribute("width", SPARK.width - x);
    cut.setAttribute("x1", x);
    cut.setAttribute("x2", x);
  };
}

const state = { kind: "macs", fraction: startingFraction(), importance: PLAN && PLAN.importance, pins: {}, picks: null };
const onRanks = []; // called after every change of the ranks

// The run's own budget, else a half.
function startingFraction() {
  const { dense, "low-rank": low } = (DATA.run || {}).measured || {};
  return dense && low && dense.macs ? Math.round((1000 * low.macs) / dense.macs) / 1000 : 0.5;
}

const DRAWING = `dense      in --[ W: out x in ]--> out                    costs out * in
low-rank   in --[ rank x in ]--[ out x rank ]--> out    costs rank * (in + out)
spectrum   ####==-.    keep the large values, cut the small ones: fewer ranks, less work`;

function words(parent) {
  const details = add(parent, "details", { class: "glossary" });
  add(details, "summary", {}, "What rank, spectrum, energy and MACs mean");
  add(details, "pre", { tabindex: "0" }, DRAWING);
  const list = add(details, "dl");
  for (const [word, meaning] of Object.entries(DATA.words)) {
    add(list, "dt", {}, word);
    add(list, "dd", {}, meaning.replaceAll("`", ""));
  }
}

// The state of the slider in the address: #keep=0.35&of=macs&by=SpectralEnergy
function fromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const keep = Number(given.get("keep"));
  if (keep > 0 && keep <= 1) state.fraction = keep;
  if (KINDS[given.get("of")] && denseOf(given.get("of"))) state.kind = given.get("of");
  if (PLAN.importances.includes(given.get("by"))) state.importance = given.get("by");
  return given.has("keep");
}

const toAddress = () => history.replaceState(null, "", `#keep=${state.fraction.toFixed(3)}&of=${state.kind}&by=${encodeURIComponent(state.importance)}`);

function explorer(parent) {
  if (!PLAN) {
    const what = "This page was written without a plan. ";
    add(parent, "p", {}, what, "The command spectrim report on the run's folder adds one.");
    return;
  }
  add(parent, "p", {}, "Move the slider: every layer's spectrum is cut where the network loses least within the budget. Orange: the cut. Dashed: the break-even rank; above it one dense layer is cheaper.");
  words(parent);
  const panel = add(parent, "div", { class: "panel" });
  const controls = add(panel, "div", { class: "controls" });
  const linked = fromAddress();
  const kind = add(add(controls, "label", {}, "Budget of "), "select", { id: "kind" });
  for (const [key, title] of Object.entries(KINDS)) if (denseOf(key)) add(kind, "option", { value: key, selected: key === state.kind }, title);
  const slider = add(controls, "input", { type: "range", id: "budget", min: "0", max: "100", step: "0.1", "aria-label": "budget kept, percent of dense" });
  const shown = add(controls, "output", { id: "kept", for: "budget" });
  const importance = add(add(controls, "label", {}, "Distortion by "), "select", { id: "importance" });
  PLAN.importances.forEach((name) => add(importance, "option", { value: name, selected: name === state.importance }, name));
  const line = add(panel, "div", { class: "totals", id: "totals", "aria-live": "polite" });
  const tools = add(parent, "div", { class: "controls" });
  const copy = add(tools, "button", { type: "button", id: "copy" }, "Copy as YAML");
  const copyPython = add(tools, "button", { type: "button", id: "copy-python" }, "Copy as Python");
  const clear = add(tools, "button", { type: "button", id: "unpin" }, "Release all pins");
  const said = add(tools, "span", { class: "soft", role: "status" });
  const details = add(parent, "details");
  add(details, "summary", {}, "The YAML");
  const text = add(details, "textarea", { id: "yaml", readonly: true, spellcheck: "false", "aria-label": "ranks as YAML" });
  if (PLAN.step > 1) add(parent, "p", { class: "soft" }, `A large network: this page offers ranks in steps of ${PLAN.step}; spectrim.allocate knows them all.`);

  const rows = rankRows(parent);
  function show(result) {
    const found = totals(state.picks);
    line.replaceChildren();
    for (const [kind, title] of Object.entries(KINDS).filter(([key]) => denseOf(key))) {
      const amount = kind === "seconds" ? milliseconds(found[kind]) : whole(found[kind]);
      const entry = add(line, "span", { "data-total": kind, "data-value": found[kind] });
      add(entry, "b", {}, percent(found[kind] / denseOf(kind)));
      entry.append(` ${title} (${amount})`);
    }
    if (result) add(line, "span", { class: "soft", "data-gap": result.gap }, result.gap <= GAP ? "the least distortion there is, to 0.01 %" : `at most ${percent(result.gap, 2)} above the least distortion there is`);
    else add(line, "span", {}, "The pinned layers alone need more: this is the smallest network they allow.");
    rows.forEach((update, index) => update(state.picks[index]));
    text.value = yaml(state.picks);
    onRanks.forEach((call) => call());
  }
  function solve() {
    const result = allocate(state.kind, state.fraction, state.importance, state.pins);
    state.picks = result ? result.picks : PLAN.weights.map((weight) => state.pins[weight.name] ?? weight[state.kind].indexOf(Math.min(...weight[state.kind])));
    show(result);
  }
  let due = 0;
  function soon() {
    shown.value = percent(state.fraction);
    slider.setAttribute("aria-valuetext", `${percent(state.fraction)} of the dense ${KINDS[state.kind]}`);
    cancelAnimationFrame(due);
    due = requestAnimationFrame(solve);
  }
  function limits() {
    const least = Math.min(100, Math.ceil(smallest(state.kind) * 1000) / 10);
    slider.min = String(least);
    state.fraction = Math.max(state.fraction, least / 100);
    slider.value = String(100 * state.fraction);
  }
  slider.addEventListener("input", () => { state.fraction = Number(slider.value) / 100; soon(); });
  slider.addEventListener("change", toAddress);
  kind.addEventListener("change", () => { state.kind = kind.value; limits(); soon(); toAddress(); });
  importance.addEventListener("change", () => { state.importance = importance.value; soon(); toAddress(); });
  clear.addEventListener("click", () => { state.pins = {}; soon(); });
  async function give(content, what) {
    try {
      await navigator.clipboard.writeText(content);
      said.textContent = `copied; it is ${what}`;
    } catch {
      text.value = content;
      details.open = true;
      text.select();
      said.textContent = document.execCommand("copy") ? "copied" : "select and copy the text below";
    }
  }
  copy.addEventListener("click", () => give(yaml(state.picks), "the prune section of a recipe"));
  copyPython.addEventListener("click", () => give(python(state.picks), "a call of prune on the factorized network"));
  onPin = soon;
  limits();
  shown.value = percent(state.fraction);
  solve();
  if (linked) requestAnimationFrame(() => parent.scrollIntoView());
}

let onPin = () => {};

function pin(weight, place) {
  if (place === null) delete state.pins[weight.name];
  else state.pins[weight.name] = place;
  onPin();
}

// What a weight is cut to: a rank, or the ranks of a Tucker form or a tensor train, whose choices are numbered.
function sizeOf(weight, place) {
  return weight.sizes ? weight.sizes[place] : weight.ranks[place];
}

function rankRows(parent) {
  const made = add(parent, "table", { class: "ranks" });
  const head = add(add(made, "thead"), "tr");
  for (const title of ["layer", "spectrum (log)", "rank", "pin", "MACs", "parameters", "energy kept"]) add(head, "th", { scope: "col" }, title);
  const body = add(made, "tbody");
  return PLAN.weights.map((weight) => rankRow(body, weight));
}

function rankRow(body, weight) {
  const row = add(body, "tr", { "data-name": weight.name });
  const last = weight.ranks.length - 1;
  const name = add(row, "td");
  add(name, "button", { type: "button", class: "name", title: "show in Layers", onclick: () => choose(weight.name, true) }, weight.name || "(model)");
  add(name, "div", { class: "soft" }, matrix(weight));
  const draw = sparkline(add(row, "td"), weight);
  const cell = add(row, "td", { "data-label": "rank" });
  const input = add(cell, "input", { type: "number", min: weight.ranks[0], max: weight.held, "aria-label": `rank of ${weight.name}; typing pins it` });
  const form = add(cell, "div", { class: "soft" });
  const pins = add(row, "td", { "data-label": "pin" });
  const box = add(add(pins, "label"), "input", { type: "checkbox", "aria-label": `pin ${weight.name} to its rank` });
  pins.append(" ");
  const full = add(pins, "button", { type: "button", "aria-label": `pin ${weight.name} to dense`, "aria-pressed": "false" }, "dense");
  const macs = add(row, "td", { "data-label": "MACs" });
  const params = add(row, "td", { "data-label": "parameters" });
  const energy = add(row, "td", { "data-label": "energy kept" });
  let [now, held] = [-1, false];
  input.addEventListener("change", () => pin(weight, nearest(weight.ranks, Number(input.value))));
  box.addEventListener("change", () => pin(weight, box.checked ? now : null));
  full.addEventListener("click", () => pin(weight, state.pins[weight.name] === last ? null : last));
  return (place) => {
    const rank = weight.ranks[place];
    const pinned = state.pins[weight.name] !== undefined;
    input.value = rank; // also where something else was typed
    if (place === now && pinned === held) return;
    [now, held] = [place, pinned];
    row.classList.toggle("pinned", pinned);
    row.dataset.rank = rank;
    box.checked = pinned;
    full.setAttribute("aria-pressed", String(state.pins[weight.name] === last));
    const parts = weight.sizes ? sizeOf(weight, place).length + 1 : weight.scheme === "cp" ? 3 : 2;
    const layers = `${["two", "three", "four", "five"][parts - 2]} layers`.concat(weight.sizes ? `, ${sizeOf(weight, place).join(" x ")}` : "");
    form.textContent = rank > weight.breakEven ? "one dense layer" : layers;
    macs.textContent = `${brief(weight.macs[place])} (${percent(weight.macs[place] / weight.dense.macs || 0, 0)})`;
    params.textContent = `${brief(weight.params[place])} (${percent(weight.params[place] / weight.dense.params || 0, 0)})`;
    energy.textContent = weight.distortions.SpectralEnergy ? percent(1 - weight.distortions.SpectralEnergy[place], 2) : "";
    draw(rank);
  };
}

const matrix = (weight) => `${weight.kind}, ${weight.scheme}, ${weight.blocks > 1 ? `${weight.blocks} x ` : ""}${weight.shape[0]} x ${weight.shape[1]}`;

// The place of the highest choice that is not above the rank asked for.
function nearest(ranks, asked) {
  let place = 0;
  while (place + 1 < ranks.length && ranks[place + 1] <= asked) place++;
  return place;
}

// Layers

let choose = () => {};

function layers(parent) {
  const ran = (DATA.run || {}).spectra || {};
  const names = Object.keys(Object.assign({}, ran, ...TIMELINE.parts.map((part) => part.ranks)));
  const spectra = PLAN ? PLAN.weights.map((weight) => [weight.name, weight.spectrum]) : names.map((name) => [name, ran[name] || []]);
  if (spectra.length) {
    const label = add(add(parent, "div", { class: "controls" }), "label", {}, "Layer ");
    const select = add(label, "select", { id: "layer" });
    spectra.forEach(([name], index) => add(select, "option", { value: index }, name || "(model)"));
    const charts = add(parent, "div", { class: "charts", id: "layer-charts" });
    const draw = () => layerCharts(charts, Number(select.value), spectra[Number(select.value)]);
    select.addEventListener("change", draw);
    onRanks.push(draw);
    choose = (name, jump) => {
      select.value = String(spectra.findIndex(([one]) => one === name));
      draw();
      if (jump) {
        parent.scrollIntoView();
        select.focus({ preventScroll: true });
      }
    };
    if (!PLAN) draw();
  }
  if (PLAN && PLAN.skipped.length) {
    const details = add(parent, "details", { open: PLAN.skipped.length <= 8 });
    add(details, "summary", {}, `Layers that stay dense, and why (${PLAN.skipped.length})`);
    table(details, ["layer", "kind", "why"], PLAN.skipped.map((layer) => [layer.name || "(model)", layer.kind, layer.reason]), [1, 2]);
  }
}

function layerCharts(charts, index, [name, spectrum]) {
  charts.replaceChildren();
  const marks = [];
  const weight = PLAN && PLAN.weights[index];
  const ran = DATA.run && DATA.run.ranks[name];
  if (weight && state.picks) marks.push({ x: weight.ranks[state.picks[index]], label: `explorer: ${weight.ranks[state.picks[index]]}` });
  if (ran) marks.push({ x: ran, label: `this run: ${ran}` });
  if (weight && weight.breakEven < weight.held) marks.push({ x: weight.breakEven, label: `break-even: ${weight.breakEven}` });
  chart(charts, { title: `Spectrum of ${name || "the model"}`, series: [{ name: "singular value", points: spectrum }], marks, log: true, x: "index" });
  if (weight) distortionChart(charts, weight, marks);
  courseCharts(charts, name);
}

function distortionChart(charts, weight, marks) {
  const series = PLAN.importances.map((method) => ({ name: method, points: weight.ranks.map((rank, place) => [rank, weight.distortions[method][place]]) }));
  const share = series.map((one) => ({ ...one, points: one.points.map(([rank, distortion]) => [rank, distortion / (one.points[0][1] || 1)]) }));
  chart(charts, { title: "Distortion of a rank, relative to the smallest rank", series: share, marks, log: true, x: "rank" });
}

function courseCharts(charts, name) {
  const { parts, marks } = TIMELINE;
  const draw = (title, key, more) => {
    const points = parts.flatMap((part) => (part[key][name] || []).map((value, index) => Object.assign([part.start + part.epochs[index], value], { gap: index === 0 })));
    chart(charts, { title: `${title} over training`, series: [{ name: title.toLowerCase(), points }], marks, x: "epoch", ...more });
  };
  draw("Rank", "ranks", { zero: true });
  draw("Orthogonality defect", "defects", { log: true });
}

// Training

// The stages of the run one after another, baselines apart: a line for each epoch, marks where phases begin and ranks were cut, the layers' parts.
function timeline() {
  const stages = ((DATA.run || {}).stages || []).filter((stage) => stage.phases.length && !stage.name.startsWith("b"));
  const [lines, marks, parts] = [[], [], []];
  for (const stage of stages) {
    stage.phases.forEach((phase, index) => {
      const [start, cuts] = [lines.length, stage.cuts[index]];
      const tuning = index === 0 && /^(4|fine-tuning)/.test(stage.name) ? "cut, then " : "";
      marks.push({ x: start, label: tuning + (stage.phases.length > 1 ? `${stage.name}, phase ${index + 1}` : stage.name) });
      cuts.forEach((cut, place) => marks.push({ x: start + cut.epoch, label: place ? "" : cuts.length > 1 ? `${cuts.length} cuts` : "cut", hint: `cut after step ${cut.step}` }));
      parts.push({ ...stage.layers[index], start });
      phase.forEach((line, epoch) => {
        const before = epoch && phase[epoch - 1].mean_rank;
        if (!cuts.length && before && line.mean_rank < before) marks.push({ x: lines.length + 0.5, label: "cut" }); // at an unknown step of the epoch
        lines.push({ ...line, gap: epoch === 0 });
      });
    });
  }
  return { lines, marks, parts };
}

const TIMELINE = timeline();

function training(parent) {
  const { lines, marks } = TIMELINE;
  const baselines = ((DATA.run || {}).stages || []).filter((stage) => stage.phases.length && stage.name.startsWith("b"));
  if (!lines.length && !baselines.length) {
    add(parent, "p", {}, "No training has been logged.");
    return;
  }
  if (lines.length) trainingCharts(add(parent, "div", { class: "charts" }), lines, marks);
  for (const stage of baselines) {
    add(parent, "h3", {}, `Baseline ${stage.name}`);
    trainingCharts(add(parent, "div", { class: "charts" }), stage.phases.flat(), []);
  }
  validation(parent);
}

function trainingCharts(charts, lines, marks) {
  const known = ["loss", "mean_rank", "learning_rate", "examples_per_s", "seconds", "gap"];
  const names = [...new Set(lines.flatMap((line) => Object.keys(line)))];
  const points = (key) => lines.flatMap((line, index) => (line[key] === undefined ? [] : [Object.assign([index + 1, line[key]], { gap: line.gap })]));
  const series = (keys) => keys.filter((key) => names.includes(key)).map((key) => ({ name: key.replace("eval_", "validation "), points: points(key) }));
  const draw = (title, keys, more = {}) => chart(charts, { title, series: series(keys), marks, x: "epoch", ...more });
  draw("Loss", ["loss", "eval_loss"]);
  draw("Accuracy on the validation split", ["eval_accuracy"]);
  draw("Penalties, as added to the loss", names.filter((key) => !known.includes(key) && !key.startsWith("eval_")), { log: true });
  if (lines.some((line) => line.mean_rank)) draw("Mean rank", ["mean_rank"], { zero: true }); // a dense network has none
  draw("Examples per second", ["examples_per_s"], { zero: true });
  draw("Learning rate", ["learning_rate"], { zero: true });
}

function validation(parent) {
  const words = { val_cut: "right after the cut", val_recalibrated: "BatchNorm recalibrated", val_corrected: "refitted", val: "at the end" };
  const rows = DATA.run.stages.flatMap((stage) => Object.entries(stage.val).map(([key, value]) => [
    `${stage.name}, ${words[key]}`,
    value.accuracy === undefined ? "" : percent(value.accuracy, 2),
    value.loss === undefined ? "" : value.loss.toFixed(4),
  ]));
  if (!rows.length) return;
  add(parent, "h3", {}, "Validation split, stage by stage");
  table(parent, ["", "accuracy", "loss"], rows);
}

// The page

const root = document.documentElement;
root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
document.getElementById("theme").addEventListener("click", () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; });
overview(document.getElementById("overview"));
explorer(document.getElementById("explorer"));
layers(document.getElementById("layers"));
training(document.getElementById("training"));
if (PLAN) choose(PLAN.weights[0].name, false);
root.dataset.ready = "true";
