// A request in, its answer or one line of what is wrong out; and what is said while it is computed.

import { byId } from "./dom.js";

const TRIES = 4; // of a request that finds the service busy
const MOST_SAID = 300; // characters of what is wrong: it may quote a value of any length
let token = sessionStorage.getItem("token");

/** What the service refused; its message is one line. */
export class ServiceError extends Error {}

/** The answer to a request. `body` is a string or a file as it is, or else what JSON says; without one it is a GET. */
export async function ask(path, body, signal) {
  for (let tries = 1; ; tries++) {
    const response = await send(path, body, signal);
    if (response.status === 401) await newToken(signal);
    else if ([429, 503].includes(response.status) && tries < TRIES) await pause(1000 * tries, signal);
    else return read(response);
  }
}

async function send(path, body, signal) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const request = { headers, signal, cache: "no-store" };
  if (body !== undefined) {
    const raw = typeof body === "string" || body instanceof Blob;
    headers["Content-Type"] = raw ? "text/csv" : "application/json";
    Object.assign(request, { method: "POST", body: raw ? body : JSON.stringify(body) });
  }
  try {
    return await fetch(path, request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("the service does not answer; start it again, then ask again");
  }
}

async function read(response) {
  let answer;
  try {
    answer = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(`the service answered ${response.status}, and no JSON`);
  }
  if (!response.ok) throw new ServiceError(answer.error || `the service answered ${response.status}`);
  return answer;
}

/** Resolves once there is a new token to try. */
function newToken(signal) {
  const form = byId("token");
  form.hidden = false;
  byId("token-word").focus();
  return new Promise((resolve, reject) => {
    signal?.addEventListener("abort", () => reject(signal.reason));
    form.addEventListener(
      "submit",
      (event) => {
        event.preventDefault();
        token = byId("token-word").value;
        sessionStorage.setItem("token", token);
        form.hidden = true;
        resolve();
      },
      { once: true },
    );
  });
}

const pause = (ms, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)));
  });

/** A line that says what is computing and for how long, then how long it took, or what is wrong. */
export class Status {
  constructor(node) {
    this.node = node;
  }

  begin(what) {
    clearInterval(this.timer);
    this.begun = performance.now();
    this.what = what;
    this.#show("busy", () => `${this.what} … ${this.seconds} s`);
    this.timer = setInterval(() => this.#show("busy", () => `${this.what} … ${this.seconds} s`), 200);
  }

  get seconds() {
    const s = (performance.now() - this.begun) / 1000;
    return s < 10 ? s.toFixed(1) : s.toFixed(0);
  }

  end(what) {
    clearInterval(this.timer);
    this.#show("done", () => `${what} in ${this.seconds} s`);
  }

  say(what) {
    clearInterval(this.timer);
    this.#show("", () => what);
  }

  fail(error) {
    clearInterval(this.timer);
    const line = error.message;
    this.#show("error", () => (line.length > MOST_SAID ? `${line.slice(0, MOST_SAID)}…` : line));
  }

  #show(state, text) {
    this.node.dataset.state = state;
    this.node.textContent = text();
  }
}

/** Runs one task at a time: a new one cancels the one before, whose end nobody hears of. */
export class Latest {
  constructor(status) {
    this.status = status;
  }

  /** Runs `task(signal)`: ended, failed (the status says why) or cancelled, by a newer one or by `cancel`. */
  async run(what, task) {
    this.controller?.abort();
    const { signal } = (this.controller = new AbortController());
    this.status.begin(what);
    try {
      const said = await task(signal);
      if (signal.aborted) return "cancelled";
      this.status.end(said ?? what);
      return "ended";
    } catch (error) {
      if (signal.aborted || error.name === "AbortError") return "cancelled";
      if (!(error instanceof ServiceError)) console.error(error);
      this.status.fail(error);
      return "failed";
    }
  }

  cancel() {
    this.controller?.abort();
    this.status.say("");
  }
}
