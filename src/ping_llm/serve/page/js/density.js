// Answers of the service in, one picture of their densities and a table of their numbers out.

import { el, onWidth, svg } from "./dom.js";
import { band, ms, percent } from "./format.js";
import { logScale, logTicks, tickText } from "./scale.js";

const HEIGHT = 210; // of the curves
const STRIP = 20; // of a destination below the axis
const AXIS = 26;
const MARGIN = 14;
const AROUND = 0.5; // of the span of 90 % that is shown on either side of it,
const MOST_AROUND = 1.4; // or this factor
const MOVE_MS = 350;
const LEVELS = ["0.05", "0.25", "0.5", "0.75", "0.95"];

/** The distributions of some destinations over one axis; where they were drawn before, they move. */
export class DensityChart {
  constructor(node, table) {
    this.node = node;
    this.body = table.tBodies[0];
    this.series = [];
    this.before = [];
    onWidth(node, (width) => {
      this.width = width;
      this.#draw(1);
    });
  }

  /** `answers` of /v1/rtt by destination, and the same without context, if there is one. */
  show(names, answers, without = []) {
    this.before = this.series;
    this.series = names.map((name, i) => seriesOf(name, answers[i], without[i]));
    this.#table(names, answers);
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches || document.hidden;
    const moves = !still && this.before.some((one) => names.includes(one.name));
    cancelAnimationFrame(this.frame);
    if (!moves) return this.#draw(1);
    const begin = performance.now();
    const step = (now) => {
      const share = Math.min(Math.max((now - begin) / MOVE_MS, 0), 1);
      this.#draw(share * share * (3 - 2 * share));
      if (share < 1) this.frame = requestAnimationFrame(step);
    };
    step(begin);
  }

  #table(names, answers) {
    const rows = answers.map((answer, i) => {
      const q = answer.quantiles;
      return el(
        "tr",
        { class: `s${i}`, "data-dst": names[i] },
        el("th", { scope: "row", class: "mono" }, el("span", { class: "swatch" }), names[i]),
        el("td", { class: "median", "data-label": "median" }, ms(q["0.5"])),
        el("td", { class: "half", "data-label": "50 %" }, band(q["0.25"], q["0.75"])),
        el("td", { class: "most", "data-label": "90 %" }, band(q["0.05"], q["0.95"])),
        el("td", { class: "p-fail", "data-label": "no answer" }, percent(answer.p_fail)),
      );
    });
    this.body.replaceChildren(...rows);
  }

  /** The state between what was drawn before (0) and what is to be (1). */
  #draw(share) {
    const { width, series } = this;
    if (!width || !series.length) return;
    const old = new Map(this.before.map((one) => [one.name, one]));
    const [from, to] = mixed(spanOf(this.before.length ? this.before : series), spanOf(series), share);
    const x = logScale(from, to, MARGIN, width - MARGIN);
    const height = HEIGHT + AXIS + STRIP * series.length + 6;
    const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
    picture.append(svg("title", {}, describe(series)), axis(x, width));
    series.forEach((one, i) => {
      const moved = between(old.get(one.name) ?? one, one, share);
      const group = svg("g", { class: `series s${i}` });
      if (one.without) group.append(svg("path", { class: "without", d: line(one.without, x) }));
      if (moved.q) group.append(...curve(moved, x), ...strip(moved.q, x, HEIGHT + AXIS + STRIP * (i + 0.5)));
      picture.append(group);
    });
    this.node.replaceChildren(picture);
  }
}

function seriesOf(name, answer, without) {
  const one = { name, q: null };
  if (answer.density) {
    one.height = heightOf(answer.density);
    one.q = LEVELS.map((level) => answer.quantiles[level]);
    const [low, high] = [one.q[0], one.q.at(-1)];
    const room = Math.min(Math.max(high / low, 1.005) ** AROUND, MOST_AROUND);
    one.span = [low / room, high * room];
  }
  if (without?.density) {
    one.without = heightOf(without.density);
    const [low, high] = [without.quantiles["0.05"], without.quantiles["0.95"]];
    one.span = one.span ? [Math.min(one.span[0], low), Math.max(one.span[1], high)] : [low, high];
  }
  return one;
}

/** The density at any RTT, of its peak; the points of the service are joined by lines over log-ms. */
function heightOf({ rtt_ms, per_log_ms }) {
  const peak = Math.max(...per_log_ms);
  const log = rtt_ms.map(Math.log);
  const step = (log.at(-1) - log[0]) / (log.length - 1);
  const height = (rtt) => {
    const place = (Math.log(rtt) - log[0]) / step;
    const i = Math.floor(place);
    if (place < -1 || i >= log.length) return 0;
    const [left, right] = [per_log_ms[i] ?? 0, per_log_ms[i + 1] ?? 0];
    return (left + (place - i) * (right - left)) / peak;
  };
  return Object.assign(height, { knots: rtt_ms });
}

/** The span of all that is shown, a little wider. */
function spanOf(series) {
  const spans = series.map((one) => one.span).filter(Boolean);
  const [low, high] = spans.length ? [Math.min(...spans.map((s) => s[0])), Math.max(...spans.map((s) => s[1]))] : [1, 500];
  const room = Math.max((high / low) ** 0.03, 1.01);
  return [low / room, high * room];
}

const mixed = (a, b, share) => a.map((value, i) => value ** (1 - share) * b[i] ** share);

function between(a, b, share) {
  if (share >= 1 || !a.q || !b.q) return b;
  const height = (rtt) => (1 - share) * a.height(rtt) + share * b.height(rtt);
  const knots = [...a.height.knots, ...b.height.knots].sort((one, other) => one - other);
  return { ...b, q: mixed(a.q, b.q, share), height: Object.assign(height, { knots }) };
}

function axis(x, width) {
  const group = svg("g", { class: "axis" });
  group.append(svg("line", { class: "base", x1: x.left, x2: x.right, y1: HEIGHT, y2: HEIGHT }));
  for (const tick of logTicks(x.from, x.to, Math.max(3, Math.floor(width / 64)))) {
    const at = x(tick);
    const anchor = at < 24 ? "start" : at > width - 24 ? "end" : "middle";
    group.append(
      svg("line", { class: "grid", x1: at, x2: at, y1: 4, y2: HEIGHT + 5 }),
      svg("text", { x: at, y: HEIGHT + 19, "text-anchor": anchor }, tickText(tick)),
    );
  }
  return group;
}

const y = (height) => HEIGHT - Math.min(height, 1) * (HEIGHT - 14);

/** Places of a curve from one RTT to another, as far as the axis goes. */
function points(height, x, from, to) {
  const [low, high] = [Math.max(from, x.from), Math.min(to, x.to)];
  if (high <= low) return [];
  const knots = [low, ...height.knots.filter((rtt) => rtt > low && rtt < high), high];
  return knots.map((rtt) => `${x(rtt).toFixed(1)} ${y(height(rtt)).toFixed(1)}`);
}

const line = (height, x) => path(points(height, x, height.knots[0], height.knots.at(-1)));

const path = (places) => (places.length ? `M${places.join("L")}` : "");

function area(height, x, from, to) {
  const places = points(height, x, from, to);
  if (!places.length) return "";
  const [left, right] = [places[0], places.at(-1)].map((place) => place.split(" ")[0]);
  return `${path([`${left} ${HEIGHT}`, ...places, `${right} ${HEIGHT}`])}Z`;
}

function curve({ height, q }, x) {
  const [low, quarter, median, upper, high] = q;
  const middle = x(median);
  return [
    svg("path", { class: "area most", d: area(height, x, low, high) }),
    svg("path", { class: "area half", d: area(height, x, quarter, upper) }),
    svg("path", { class: "line", d: line(height, x) }),
    svg("line", { class: "median", x1: middle, x2: middle, y1: HEIGHT, y2: y(height(median)) }),
  ];
}

function strip(q, x, at) {
  const [low, quarter, median, upper, high] = q.map((rtt) => Math.min(Math.max(x(rtt), x.left), x.right));
  const bar = (name, from, to, size) =>
    svg("rect", { class: name, x: from, y: at - size / 2, width: Math.max(to - from, 1.5), height: size, rx: Math.min(size / 2, 3) });
  return [
    bar("bar most", low, high, 4),
    bar("bar half", quarter, upper, 10),
    svg("line", { class: "mid", x1: median, x2: median, y1: at - 7, y2: at + 7 }),
  ];
}

function describe(series) {
  const said = series.map(({ name, q }) => (q ? `${name}: median ${ms(q[2])} ms` : `${name}: never answers`));
  return `Density of the RTT. ${said.join("; ")}`;
}
