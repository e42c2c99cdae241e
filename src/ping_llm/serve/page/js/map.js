// A source in, the map of the IPv4 space as seen from it out: 256 prefixes at a time, which come in pieces.

import { Latest, Status, ask } from "./api.js";
import { css, luminance, mix, surface, viridis } from "./colors.js";
import { byId, el, svg } from "./dom.js";
import { band, ms, percent, several } from "./format.js";
import { hilbert } from "./hilbert.js";

const CELL = 28;
const FARTHEST_MS = 400; // has the last of the colours, 0 the first
const LEGEND_MS = [0, 10, 50, 100, 200, 300];
const FIRST_PIECE = 16; // prefixes of a piece; the next is larger where that came
const SOON_MS = 400; // or sooner
const MOST_PIECE = 64;
const LEAST_SHOWN = 0.18; // of the colour of a cell that is quite uncertain
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class SpaceMap {
  /** `choose(prefix)` is called for a /24 that is chosen. */
  constructor(choose) {
    this.choose = choose;
    this.latest = new Latest(new Status(byId("map-status")));
    this.bytes = [];
    this.marks = [];
    this.focused = null;
    byId("map").addEventListener("keydown", (event) => this.#key(event));
    addEventListener("themechange", () => this.#paint());
    this.#build();
    drawLegend();
  }

  /** Asks anew, of another source or situation: the fields of the request beside `within`. */
  ask(situation, destinations) {
    if (!this.focused) this.home.node.setAttribute("tabindex", "-1");
    this.situation = situation;
    this.destinations = destinations;
    if (!this.focused) this.home.node.setAttribute("tabindex", "0");
    return this.#load();
  }

  /** Says that there is nothing to show. */
  cancel() {
    this.latest.cancel();
  }

  /** The cell that is told of before one is chosen: of the first destination that is here. */
  get home() {
    const [bytes] = this.#here()[0] ?? [[]];
    return this.cells[bytes[this.bytes.length] ?? 0];
  }

  /** Bytes and place of the destinations that lie in what is shown. */
  #here() {
    const numbers = (this.destinations ?? []).map((text, i) => [text.split("/")[0].split(".").map(Number), i]);
    return numbers.filter(([bytes]) => bytes.length === 4 && this.bytes.every((byte, i) => byte === bytes[i]));
  }

  get within() {
    return prefixOf(this.bytes);
  }

  zoom(bytes) {
    this.bytes = bytes;
    this.found = new Map();
    this.#build();
    return this.#load();
  }

  #load() {
    this.#paint(true);
    this.#mark();
    if (!this.situation) return Promise.resolve("cancelled");
    return this.latest.run(`Computing ${this.within}`, (signal) => this.#pieces(signal));
  }

  async #pieces(signal) {
    const found = new Map();
    let size = FIRST_PIECE;
    for (let first = 0; first < 256; ) {
      const begun = performance.now();
      const body = { ...this.situation, within: this.within, first, count: size };
      const piece = await ask("/v1/map", body, signal);
      if (signal.aborted) return "";
      piece.prefix.forEach((prefix, i) => {
        found.set(prefix, { low: piece["q0.05"][i], median: piece.median_ms[i], high: piece["q0.95"][i], pFail: piece.p_fail[i] });
      });
      first += size;
      this.#arrived(found, first);
      this.latest.status.what = `Computing ${this.within}: ${Math.min(first, 256)} of 256`;
      if (performance.now() - begun < SOON_MS) size = Math.min(2 * size, MOST_PIECE);
    }
    return several(found.size, "prefix", "prefixes");
  }

  #arrived(found, upto) {
    for (const cell of this.cells.slice(0, upto)) {
      this.found.set(cell.prefix, found.get(cell.prefix) ?? null);
      cell.stale = false;
    }
    this.#paint();
    this.#tell(this.focused ?? this.home);
  }

  #build() {
    const depth = this.bytes.length + 1;
    const base = this.bytes.reduce((number, byte) => 256 * number + byte, 0) * 256;
    this.found = new Map();
    this.cells = Array.from({ length: 256 }, (_, byte) => {
      const [x, y] = hilbert(base + byte, 4 * depth).map((place) => place % 16);
      return { byte, x, y, prefix: prefixOf([...this.bytes, byte]), stale: true };
    });
    const size = 16 * CELL;
    const picture = svg("svg", { viewBox: `-1 -1 ${size + 2} ${size + 2}`, role: "group", "aria-label": `Map of ${this.within}` });
    for (const cell of this.cells) {
      cell.rect = svg("rect", { width: CELL - 1, height: CELL - 1, rx: 2 });
      cell.text = svg("text", { x: (CELL - 1) / 2, y: CELL / 2 + 3, "text-anchor": "middle" }, String(cell.byte));
      cell.node = svg(
        "g",
        {
          class: "map-cell",
          role: "button",
          tabindex: "-1",
          transform: `translate(${cell.x * CELL} ${cell.y * CELL})`,
          "data-prefix": cell.prefix,
          click: () => this.#enter(cell),
          focus: () => this.#focus(cell),
          pointerenter: () => this.#tell(cell),
        },
        cell.rect,
        cell.text,
      );
      picture.append(cell.node);
    }
    this.rings = svg("g", { class: "rings", "aria-hidden": "true" });
    picture.append(this.rings);
    picture.addEventListener("pointerleave", () => this.#tell(this.focused ?? this.home));
    byId("map").replaceChildren(picture);
    this.focused = null;
    this.home.node.setAttribute("tabindex", "0");
    this.#crumbs();
  }

  #crumbs() {
    const steps = [el("button", { type: "button", class: "link", click: () => this.zoom([]) }, "IPv4")];
    this.bytes.forEach((_, i) => {
      const bytes = this.bytes.slice(0, i + 1);
      steps.push(el("button", { type: "button", class: "link mono", click: () => this.zoom(bytes) }, prefixOf(bytes)));
    });
    steps.at(-1).setAttribute("aria-current", "true");
    byId("crumbs").replaceChildren(...steps);
  }

  /** Fills the cells with the colours of what is known; with `stale`, all of it is of an earlier question. */
  #paint(stale = false) {
    const ground = surface(byId("map").closest(".panel"));
    const dark = luminance(ground) < 0.3;
    for (const cell of this.cells) {
      if (stale) cell.stale = true;
      const value = this.found.get(cell.prefix);
      const state = value ? "known" : value === null ? "blank" : "unknown";
      cell.node.dataset.state = cell.stale && value ? "stale" : state;
      const known = value && value.median !== null;
      const color = known ? mix(ground, viridis(shareOf(value.median), dark), certainty(value)) : null;
      cell.rect.setAttribute("fill", color ? css(color) : "none");
      cell.text.setAttribute("fill", color && luminance(color) < 0.18 ? "#fff" : "#111");
      cell.node.setAttribute("aria-label", `${cell.prefix}: ${spoken(value)}`);
    }
    drawLegend(ground, dark);
  }

  #mark() {
    const rings = this.#here().map(([bytes, i]) => {
      const cell = this.cells[bytes[this.bytes.length]];
      if (!cell) return null;
      const at = { x: cell.x * CELL - 1, y: cell.y * CELL - 1 };
      return svg("rect", { ...at, width: CELL + 1, height: CELL + 1, rx: 3, class: `ring s${i}` });
    });
    this.rings.replaceChildren(...rings.filter(Boolean));
  }

  #enter(cell) {
    if (this.found.get(cell.prefix) === null) return;
    if (this.bytes.length === 2) return this.choose(cell.prefix);
    this.zoom([...this.bytes, cell.byte]);
    this.home.node.focus();
  }

  #focus(cell) {
    (this.focused ?? this.home).node.setAttribute("tabindex", "-1");
    this.focused = cell;
    cell.node.setAttribute("tabindex", "0");
    this.#tell(cell);
  }

  #key(event) {
    const cell = this.focused;
    if (!cell || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key in ARROWS) {
      const [right, down] = ARROWS[event.key];
      this.cells.find((one) => one.x === cell.x + right && one.y === cell.y + down)?.node.focus();
    } else if (event.key === "Enter" || event.key === " ") {
      this.#enter(cell);
    } else if (event.key === "Escape" && this.bytes.length) {
      const byte = this.bytes.at(-1);
      this.zoom(this.bytes.slice(0, -1));
      this.cells[byte].node.focus();
    } else return;
    event.preventDefault();
  }

  #tell(cell) {
    const value = this.found.get(cell.prefix);
    const rows = [["prefix", cell.prefix, "mono"]];
    if (value === null) rows.push(["", "no public hosts"]);
    else {
      rows.push(["median", value ? `${ms(value.median)} ms` : "…"]);
      rows.push(["90 % within", value ? `${band(value.low, value.high)} ms` : "…"]);
      rows.push(["no answer", value ? percent(value.pFail) : "…"]);
    }
    while (rows.length < 4) rows.push(["", "\u00a0"]);
    byId("cell").replaceChildren(...rows.flatMap(([name, text, kind]) => [el("dt", {}, name), el("dd", { class: kind }, text)]));
  }
}

/** 192.0.0.0/16 of the bytes 192 and 0. */
export const prefixOf = (bytes) => `${[...bytes, 0, 0, 0, 0].slice(0, 4).join(".")}/${8 * bytes.length}`;

/** The place of an RTT among the colours; by its root, so that near and far ones have their share. */
const shareOf = (rtt) => Math.sqrt(rtt / FARTHEST_MS);

/** How much of its colour a cell shows: 1 where 90 % lie close together, ½ where they span a factor of 5. */
function certainty({ low, high }) {
  const spread = Math.log(high / low) / Math.log(5);
  return LEAST_SHOWN + (1 - LEAST_SHOWN) / (1 + spread ** 2);
}

function spoken(value) {
  if (value === null) return "no public hosts";
  if (!value) return "not computed yet";
  return `median ${ms(value.median)} ms, 90 % within ${band(value.low, value.high)} ms, no answer ${percent(value.pFail)}`;
}

function drawLegend(ground = [255, 255, 255], dark = false) {
  const [width, row] = [220, 9];
  const cells = [];
  [1, 0.6, LEAST_SHOWN].forEach((shown, j) => {
    for (let i = 0; i < 44; i++) {
      const fill = css(mix(ground, viridis((i + 0.5) / 44, dark), shown));
      cells.push(svg("rect", { x: (i * width) / 44, y: j * row, width: width / 44 + 0.4, height: row, fill }));
    }
  });
  const ticks = LEGEND_MS.map((tick) => {
    const anchor = tick === 0 ? "start" : "middle";
    return svg("text", { x: shareOf(tick) * width, y: 3 * row + 14, "text-anchor": anchor }, String(tick));
  });
  ticks.push(svg("text", { x: width + 6, y: row }, "certain"), svg("text", { x: width + 6, y: 3 * row }, "uncertain"));
  ticks.push(svg("text", { x: width + 6, y: 3 * row + 14 }, "ms"));
  const attributes = { viewBox: `0 0 ${width + 60} ${3 * row + 18}`, role: "img" };
  byId("legend").replaceChildren(svg("svg", attributes, svg("title", {}, "Colours: median RTT; faded: uncertain"), ...cells, ...ticks));
}
