// Scored measurements of some rows in, a picture of them over time out: how many anomalies there are, and where.

import { onWidth, svg } from "./dom.js";
import { count, ms } from "./format.js";
import { steps, timeTicks } from "./scale.js";

const BARS = 110; // height
const ROW = 26;
const AXIS = 24;
const BINS = 64; // bars
const LEFT = 74;

export class Timeline {
  constructor(node) {
    this.node = node;
    this.rows = [];
    onWidth(node, (width) => {
      this.width = width;
      this.draw();
    });
  }

  /** Begins anew with rows of /v1/rows; `at` is the p-value of an anomaly. */
  begin(rows, at) {
    this.at = at;
    this.rows = rows.map((row) => ({ ...row, scored: 0, upto: row.first_time_s, marks: [] }));
    this.from = Math.min(...rows.map((row) => row.first_time_s));
    this.to = Math.max(...rows.map((row) => row.last_time_s), this.from + 60);
    this.bins = Array.from({ length: BINS }, () => ({ slower: 0, faster: 0, failed: 0, all: 0 }));
    this.draw();
  }

  get scored() {
    return this.rows.reduce((sum, row) => sum + row.scored, 0);
  }

  get found() {
    return this.rows.reduce((sum, row) => sum + row.marks.length, 0);
  }

  /** Adds what /v1/anomalies says of a stretch of the i-th row. */
  add(i, stretch) {
    const row = this.rows[i];
    stretch.time_s.forEach((time, k) => {
      const bin = this.bins[Math.min(Math.floor(((time - this.from) / (this.to - this.from)) * BINS), BINS - 1)];
      bin.all += 1;
      const [rtt, p] = [stretch.rtt[k], stretch.p_value[k]];
      if (p > this.at) return;
      const kind = kindOf(rtt, stretch.pit[k]);
      bin[kind] += 1;
      row.marks.push({ time, rtt, p, kind });
    });
    row.scored += stretch.time_s.length;
    row.upto = stretch.time_s.at(-1);
    this.draw();
  }

  draw() {
    const { width, rows } = this;
    if (!width || !rows.length) return;
    const right = width - 10;
    const x = (time) => LEFT + ((time - this.from) / (this.to - this.from)) * (right - LEFT);
    const height = BARS + AXIS + ROW * rows.length + 6;
    const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
    picture.append(svg("title", {}, this.#describe()), this.#axis(x, right, height), this.#bars(x, right));
    rows.forEach((row, i) => picture.append(this.#row(row, x, BARS + AXIS + ROW * (i + 0.5))));
    this.node.replaceChildren(picture);
  }

  #describe() {
    const chance = (this.scored * this.at).toFixed(1);
    return `${count(this.found)} anomalies in ${count(this.scored)} measurements; ${chance} are to be expected by chance`;
  }

  #axis(x, right, height) {
    const group = svg("g", { class: "axis" });
    for (const { time, text } of timeTicks(this.from, this.to, Math.max(2, Math.floor((right - LEFT) / 80)))) {
      group.append(
        svg("line", { class: "grid", x1: x(time), x2: x(time), y1: 2, y2: height }),
        svg("text", { x: x(time), y: BARS + 17, "text-anchor": "middle" }, text),
      );
    }
    return group;
  }

  /** Anomalies in each stretch of time, and how many of as many measurements there are by chance. */
  #bars(x, right) {
    const found = this.bins;
    const most = Math.max(2, ...found.map((bin) => bin.slower + bin.faster + bin.failed));
    const y = (value) => BARS - (value / most) * (BARS - 12);
    const size = (right - LEFT) / BINS;
    const group = svg("g", { class: "axis" });
    for (const tick of steps(0, most, 4).filter(Number.isInteger)) {
      group.append(
        svg("line", { class: tick ? "grid" : "base", x1: LEFT, x2: right, y1: y(tick), y2: y(tick) }),
        svg("text", { x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, String(tick)),
      );
    }
    let chance = "";
    found.forEach((bin, i) => {
      let from = 0;
      for (const kind of ["slower", "faster", "failed"]) {
        if (!bin[kind]) continue;
        const [top, bottom] = [y(from + bin[kind]), y(from)];
        group.append(svg("rect", { class: `count ${kind}`, x: LEFT + i * size + 1, y: top, width: Math.max(size - 2, 2), height: bottom - top }));
        from += bin[kind];
      }
      const at = y(bin.all * this.at).toFixed(1);
      chance += bin.all ? `M${(LEFT + i * size).toFixed(1)} ${at}h${size.toFixed(1)}` : "";
    });
    group.append(svg("path", { class: "chance", d: chance }));
    return group;
  }

  #row(row, x, at) {
    const group = svg("g", { class: "probe" });
    const name = row.probe_id < 0 ? `row ${row.row}` : `${row.probe_id}`;
    group.append(
      svg("text", { x: LEFT - 8, y: at + 4, "text-anchor": "end" }, name),
      svg("line", { class: "span", x1: x(row.first_time_s), x2: x(row.last_time_s), y1: at, y2: at }),
    );
    if (row.scored) {
      const from = x(row.first_time_s);
      group.append(svg("line", { class: "scored", x1: from, x2: Math.max(x(row.upto), from + 2), y1: at, y2: at }));
    }
    for (const { time, rtt, p, kind } of row.marks) {
      const place = `translate(${x(time).toFixed(1)} ${at})`;
      const said = `${new Date(1000 * time).toISOString().slice(0, 19)}: ${kind}${kind === "failed" ? "" : `, ${ms(rtt)} ms`}; p ${p.toPrecision(2)}`;
      group.append(svg("path", { class: `mark ${kind}`, d: SHAPES[kind], transform: place }, svg("title", {}, said)));
    }
    return group;
  }
}

const SHAPES = { slower: "M0 -6L5 4H-5Z", faster: "M0 6L5 -4H-5Z", failed: "M-4 -4L4 4M4 -4L-4 4" };

/** Whether an anomaly is a failure, or slower or faster than expected: `pit` is the share of answers that are faster. */
export function kindOf(rtt, pit) {
  return rtt < 0 ? "failed" : pit < 0.5 ? "faster" : "slower";
}
