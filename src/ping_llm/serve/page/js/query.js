// The form in; density, ranking and map of its query out, each asked for anew when the query changes.

import { Latest, ServiceError, Status, ask } from "./api.js";
import { ContextTable } from "./context.js";
import { DensityChart } from "./density.js";
import { byId, el } from "./dom.js";
import { count, ms, odds, percent, several } from "./format.js";
import { SpaceMap } from "./map.js";

const MOST_DESTINATIONS = 8;
const TYPING_MS = 150; // that several changes are waited for

const form = byId("query");
const fields = { src: byId("src"), dst: byId("dst"), at: byId("at") };
const distributions = new Latest(new Status(byId("query-status")));
const ranking = new Latest(new Status(byId("ranking-status")));
const chart = new DensityChart(byId("density"), byId("numbers"));
const context = new ContextTable(() => soon());
const map = new SpaceMap((prefix) => {
  fields.dst.value = [...destinations(), prefix].join(" ");
  soon();
});
let timer;

/** Asks, once the user has come to rest. */
function soon() {
  clearTimeout(timer);
  timer = setTimeout(askAll, TYPING_MS);
}

const destinations = () => [...new Set(fields.dst.value.split(/[\s,;]+/).filter(Boolean))];

async function askAll() {
  clearTimeout(timer);
  grow();
  const dst = destinations();
  const at = fields.at.value.trim() || null;
  const situation = { src: fields.src.value.trim(), at, ...context.situation };
  remember(situation.src, dst, at);
  const going = distributions.run(`Computing ${several(dst.length, "distribution")}`, (signal) => askRtt(situation, dst, signal));
  ranking.cancel();
  map.cancel();
  if ((await going) !== "ended") return;
  const ranked = await ranking.run("Ranking", (signal) => askRanking(situation, dst, signal));
  if (ranked !== "cancelled") await map.ask(situation, dst);
}

async function askRtt(situation, dst, signal) {
  if (!dst.length) throw new ServiceError("name at least one destination");
  if (dst.length > MOST_DESTINATIONS) {
    throw new ServiceError(`${dst.length} destinations; ${MOST_DESTINATIONS} at most are told apart by colour, leave some out`);
  }
  const queries = dst.map((one) => ({ dst: one }));
  const has = Boolean(situation.context);
  const without = has ? dst.map((one) => ({ dst: one, context: null })) : [];
  const { answers } = await ask("/v1/rtt", { ...situation, density: true, queries: [...queries, ...without] }, signal);
  if (signal.aborted) return "";
  chart.show(dst, answers.slice(0, dst.length), answers.slice(dst.length));
  tellSource(answers[0], has);
  return several(dst.length, "distribution");
}

/** How much of the context was read, and how much of the source. */
function tellSource(answer, has) {
  const said = ["Each curve is as high as its own peak; the bars below it are 50 and 90 %, the tick is the median."];
  if (has) said.push(`Dotted: without earlier pings. ${count(answer.context_measurements)} of ${several(answer.context_given, "ping")} fit.`);
  const weights = Object.entries(answer.src_weights).filter(([, weight]) => weight >= 0.005);
  if (weights.length > 1) {
    said.push(`Known of the source: ${weights.map(([name, weight]) => `${name} ${percent(weight)}`).join(", ")}.`);
  }
  byId("density-note").textContent = said.join(" ");
}

async function askRanking(situation, dst, signal) {
  const { rows, p_none: none } = await ask("/v1/rank", { ...situation, dst }, signal);
  if (signal.aborted) return "";
  const items = rows.map((row) => {
    const bar = el("span", { class: "fill" });
    bar.style.width = `${100 * row.p_fastest}%`;
    return el(
      "li",
      { class: `s${dst.indexOf(row.dst_addr)}`, "data-dst": row.dst_addr },
      el("span", { class: "mono who" }, row.dst_addr),
      el("span", { class: "p-fastest" }, percent(row.p_fastest)),
      el("span", { class: "bar-track" }, bar),
      el("span", { class: "hint odds" }, odds(row.p_fastest) && `odds ${odds(row.p_fastest)}`),
      el("span", { class: "hint more" }, `median ${ms(row.median_ms)} ms, place ${row.expected_rank.toFixed(2)}`),
    );
  });
  byId("ranking").replaceChildren(...items);
  byId("ranking-note").textContent = `None of them answers: ${percent(none)}.`;
  return several(dst.length, "candidate");
}

/** The query in the address of the page, so that it can be kept; the context is not in it. */
function remember(src, dst, at) {
  const words = new URLSearchParams({ src, dst: dst.join(" "), ...(at && { at }) });
  history.replaceState(null, "", `#${words}`);
}

function grow() {
  fields.dst.rows = 1;
  if (fields.dst.scrollHeight > fields.dst.clientHeight + 2) fields.dst.rows = 3;
}

async function begin() {
  await distributions.run("Loading the example", async (signal) => {
    const [facts, example] = await Promise.all([ask("/v1/model", undefined, signal), ask("/v1/example", undefined, signal)]);
    const million = (facts.parameters / 1e6).toPrecision(2);
    byId("facts").textContent = `${facts.model} · ${million} M parameters · ${facts.device}`;
    byId("to-anomalies").hidden = !facts.rows;
    const words = new URLSearchParams(location.hash.slice(1));
    const given = words.has("src") ? { src: words.get("src"), dst: words.get("dst")?.split(" ") ?? [], at: words.get("at") } : example;
    fields.src.value = given.src;
    fields.dst.value = given.dst.join(" ");
    fields.at.value = given.at ?? "";
    const same = given.src === example.src && (given.at ?? "") === (example.at ?? "");
    context.set(same ? example.context : [], example.made_up ? "made up, as an example" : "of the rows of the service");
  });
  if (fields.src.value) await askAll();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  askAll();
});
form.addEventListener("change", soon);
fields.dst.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey) return;
  event.preventDefault();
  askAll();
});
begin();
