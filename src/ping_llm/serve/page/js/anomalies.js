// A part of the service's rows in; its anomalies over time, scored stretch by stretch of the busiest probes, out.

import { Latest, Status, ask } from "./api.js";
import { byId, el } from "./dom.js";
import { band, count, ms, percent, several, when } from "./format.js";
import { Timeline, kindOf } from "./timeline.js";

const STRETCH = [16, 256]; // measurements of a request, least and most
const SOON_MS = 700; // that a request should take
const LISTED = 40;
const SIGNS = { slower: "▲", faster: "▼", failed: "×" };

const timeline = new Timeline(byId("timeline"));
const run = new Latest(new Status(byId("run-status")));
let told = [];

async function begin() {
  let facts;
  const known = await run.run("Loading", async (signal) => {
    facts = await ask("/v1/model", undefined, signal);
  });
  if (known !== "ended") return;
  byId("facts").textContent = `${facts.model} · ${(facts.parameters / 1e6).toPrecision(2)} M parameters · ${facts.device}`;
  if (!facts.rows) {
    run.status.fail({ message: "this service has no rows to look into; start it with --rows ROWS" });
    byId("go").disabled = true;
    return;
  }
  const parts = Object.entries(facts.rows.parts);
  byId("part").replaceChildren(...parts.map(([part, held]) => el("option", { value: part }, `${part} (${count(held)})`)));
  byId("part").value = (parts.find(([part]) => part.startsWith("val")) ?? parts[0])[0];
  look();
}

async function look() {
  const at = Number(byId("at").value);
  told = [];
  byId("progress").value = 0;
  byId("go").textContent = "Stop";
  const ended = await run.run("Reading the rows", async (signal) => {
    const found = await ask(`/v1/rows?part=${encodeURIComponent(byId("part").value)}`, undefined, signal);
    const rows = found.rows.slice(0, Number(byId("sources").value));
    if (signal.aborted) return "";
    timeline.begin(rows, at);
    list();
    return scoreAll(found.part, rows, at, signal);
  });
  if (ended !== "cancelled") byId("go").textContent = "Look again";
}

/** A stretch of each probe in turn, until there are no more; longer ones where they come soon. */
async function scoreAll(part, rows, at, signal) {
  const total = rows.reduce((sum, row) => sum + row.measurements, 0);
  const upto = rows.map(() => 0);
  let [size, done] = [STRETCH[0], 0];
  while (done < total) {
    for (const [i, row] of rows.entries()) {
      if (upto[i] >= row.measurements) continue;
      const begun = performance.now();
      const stretch = await ask("/v1/anomalies", { part, row: row.row, first: upto[i], count: size, at }, signal);
      if (signal.aborted) return "";
      size = performance.now() - begun < SOON_MS ? Math.min(2 * size, STRETCH[1]) : Math.max(Math.floor(size / 2), STRETCH[0]);
      upto[i] += stretch.time_s.length;
      done += stretch.time_s.length;
      timeline.add(i, stretch);
      told.push(...stretch.anomalies);
      list();
      progress(done, total);
    }
  }
  return `${several(done, "measurement")} of ${several(rows.length, "probe")}`;
}

function progress(done, total) {
  byId("progress").value = done / total;
  const seconds = (performance.now() - run.status.begun) / 1000;
  const left = Math.ceil((seconds * (total - done)) / done);
  run.status.what = `Scoring: ${count(done)} of ${several(total, "measurement")}, about ${left} s left`;
}

function list() {
  told.sort((one, other) => one.p_value - other.p_value);
  const { found, scored, at } = timeline;
  byId("list-count").textContent = scored ? `${count(found)} of ${several(scored, "measurement")}; by chance ${(scored * at).toFixed(1)}` : "";
  byId("list").tBodies[0].replaceChildren(...told.slice(0, LISTED).map(line));
}

function line(one) {
  const kind = kindOf(one.rtt, one.pit);
  const query = new URLSearchParams({ src: one.src_addr, dst: one.dst_addr, at: one.event_time });
  return el(
    "tr",
    {},
    el("td", { class: "time" }, when(one.event_time)),
    el("td", { class: "mono" }, one.src_addr),
    el("td", { class: "mono" }, one.dst_addr),
    el("td", { class: `number kind ${kind}`, "data-label": "observed" }, el("span", { "aria-hidden": "true" }, `${SIGNS[kind]} `), kind === "failed" ? "no answer" : ms(one.rtt)),
    el("td", { class: "number", "data-label": "90 %" }, band(one["q0.05"], one["q0.95"])),
    el("td", { class: "number", "data-label": "no answer" }, percent(one.p_fail)),
    el("td", { class: "number p", "data-label": "p-value" }, one.p_value.toPrecision(2)),
    el("td", {}, el("a", { href: `/#${query}`, "aria-label": `Query ${one.src_addr} to ${one.dst_addr}` }, "query")),
  );
}

byId("what").addEventListener("submit", (event) => {
  event.preventDefault();
  if (byId("go").textContent === "Stop") {
    run.cancel();
    run.status.say(`Stopped after ${several(timeline.scored, "measurement")}`);
    byId("go").textContent = "Look again";
  } else look();
});
for (const id of ["part", "sources", "at"]) byId(id).addEventListener("change", look);
begin();
