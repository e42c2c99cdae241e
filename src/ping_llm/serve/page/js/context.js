// Files, and what is pasted, in; rows that can be switched on and off, and the context that those which are on make, out.

import { Latest, Status, ask } from "./api.js";
import { byId, el } from "./dom.js";
import { count, ms, several, when } from "./format.js";

const SHOWN = 200; // rows that the table shows; those beyond count all the same

export class ContextTable {
  /** `changed()` is called when another context is to be used. */
  constructor(changed) {
    this.changed = changed;
    this.rows = [];
    this.latest = new Latest(new Status(byId("context-status")));
    this.body = byId("context-rows").tBodies[0];
    byId("context-file").addEventListener("click", () => byId("file").click());
    byId("file").addEventListener("change", ({ target }) => {
      for (const file of target.files) this.read(file, file.name);
      target.value = "";
    });
    byId("context-paste").addEventListener("click", () => this.#togglePaste());
    byId("paste-add").addEventListener("click", async () => {
      if ((await this.read(byId("paste-text").value, "what was pasted")) === "ended") {
        byId("paste-text").value = "";
        this.#togglePaste(false);
      }
    });
    byId("context-none").addEventListener("click", () => this.#switchAll());
    byId("whose").addEventListener("change", () => this.changed());
    this.#takeDrops();
  }

  /** The fields of a request that stand for the rows which are on. */
  get situation() {
    const on = this.rows.filter((row) => row.on).map((row) => row.values);
    const whose = byId("whose").value;
    return on.length ? { context: on, ...(whose && { [whose]: true }) } : {};
  }

  /** Replaces all rows, and says what they are. */
  set(rows, what) {
    this.rows = rows.map((values) => ({ values, on: true }));
    this.latest.status.say(rows.length ? `${several(rows.length, "ping")}, ${what}` : "Open, paste or drop a file");
    this.#draw();
  }

  /** Adds the rows of a table, as text or as a file. */
  read(content, name) {
    return this.latest.run(`Reading ${name}`, async (signal) => {
      const { rows } = await ask("/v1/table", content, signal);
      this.rows.push(...rows.map((values) => ({ values, on: true })));
      this.#draw();
      this.changed();
      return `${several(rows.length, "row")} of ${name}`;
    });
  }

  #togglePaste(open = byId("paste").hidden) {
    byId("paste").hidden = !open;
    byId("context-paste").setAttribute("aria-expanded", String(open));
    if (open) byId("paste-text").focus();
    else byId("context-paste").focus();
  }

  #switchAll() {
    const on = !this.rows.some((row) => row.on);
    this.rows.forEach((row) => (row.on = on));
    this.#draw();
    this.changed();
  }

  #takeDrops() {
    const panel = byId("context");
    const over = (event) => {
      event.preventDefault();
      panel.classList.toggle("over", event.type === "dragover");
    };
    panel.addEventListener("dragover", over);
    panel.addEventListener("dragleave", over);
    panel.addEventListener("drop", (event) => {
      over(event);
      const text = event.dataTransfer.getData("text");
      for (const file of event.dataTransfer.files) this.read(file, file.name);
      if (!event.dataTransfer.files.length && text) this.read(text, "what was dropped");
    });
    panel.addEventListener("paste", (event) => {
      if (event.target.matches("textarea, input")) return;
      event.preventDefault();
      this.read(event.clipboardData.getData("text"), "what was pasted");
    });
  }

  #draw() {
    this.body.replaceChildren(...this.rows.slice(0, SHOWN).map((row, i) => this.#row(row, i)));
    this.#counts();
  }

  #row(row, place) {
    const { src_addr: src, dst_addr: dst, rtt, event_time: time } = row.values;
    const said = `ping ${place + 1}, to ${dst}`;
    const on = el("input", { type: "checkbox", checked: row.on, "aria-label": `Use ${said}` });
    const node = el(
      "tr",
      { class: row.on ? "" : "off", title: `from ${src}` },
      el("td", {}, on),
      el("td", { class: "mono" }, dst),
      el("td", { class: "number" }, rtt < 0 ? "none" : ms(rtt)),
      el("td", { class: "time" }, when(time).slice(5)),
      el("td", {}, el("button", { type: "button", class: "quiet", "aria-label": `Remove ${said}`, click: () => this.#remove(row) }, "×")),
    );
    on.addEventListener("change", () => {
      row.on = on.checked;
      node.classList.toggle("off", !row.on);
      this.#counts();
      this.changed();
    });
    return node;
  }

  #remove(row) {
    const place = this.rows.indexOf(row);
    this.rows.splice(place, 1);
    this.#draw();
    const buttons = this.body.querySelectorAll("button");
    (buttons[Math.min(place, buttons.length - 1)] ?? byId("context-file")).focus();
    this.changed();
  }

  #counts() {
    const on = this.rows.filter((row) => row.on).length;
    const more = this.rows.length > SHOWN ? `, ${SHOWN} shown` : "";
    byId("context-count").textContent = this.rows.length ? `${count(on)} of ${count(this.rows.length)} on${more}` : "none";
    byId("context-none").textContent = on || !this.rows.length ? "All off" : "All on";
    byId("context-none").disabled = !this.rows.length;
  }
}
