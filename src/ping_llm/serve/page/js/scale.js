// The span of an axis in, places on it and the marks that people expect there out.

/** A log axis of `from` to `to` ms on `left` to `right` pixels. */
export function logScale(from, to, left, right) {
  const [low, high] = [Math.log(from), Math.log(to)];
  const scale = (x) => left + ((Math.log(x) - low) / (high - low)) * (right - left);
  scale.at = (pixel) => Math.exp(low + ((pixel - left) / (right - left)) * (high - low));
  return Object.assign(scale, { from, to, left, right });
}

/** At most about `most` round numbers from `from` to `to` on a log axis: 1, 2, 5 · 10ⁿ, or of equal steps if it is short. */
export function logTicks(from, to, most) {
  for (const digits of [[1, 2, 5], [1, 3], [1]]) {
    const found = [];
    for (let power = Math.floor(Math.log10(from)); power <= Math.log10(to); power++) {
      found.push(...digits.map((digit) => Number((digit * 10 ** power).toPrecision(2))));
    }
    const inside = found.filter((tick) => tick >= from && tick <= to);
    if (digits.length === 3 && inside.length < 3) return steps(from, to, most);
    if (inside.length <= most) return inside;
  }
  return [from, to].map((end) => Number(end.toPrecision(1)));
}

/** At most `most` multiples of 1, 2 or 5 · 10ⁿ. */
export function steps(from, to, most) {
  const rough = (to - from) / Math.max(most, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((size) => size >= rough);
  const first = Math.ceil(from / step);
  const last = Math.floor(to / step + 1e-9);
  return Array.from({ length: Math.max(last - first + 1, 0) }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/** A tick as text. */
export const tickText = (tick) => (tick >= 1000 ? tick.toLocaleString("en") : String(tick));

const MINUTE = 60;
const SPANS = [MINUTE, 5 * MINUTE, 15 * MINUTE, 30 * MINUTE, 3600, 2 * 3600, 3 * 3600, 6 * 3600, 12 * 3600, 86400, 2 * 86400];
SPANS.push(7 * 86400, 14 * 86400, 30 * 86400, 91 * 86400, 365 * 86400);

/** At most `most` round times from `from` to `to`, all in seconds, and what each is called. */
export function timeTicks(from, to, most) {
  const step = SPANS.find((span) => (to - from) / span <= most) ?? (to - from) / most;
  const found = [];
  for (let time = Math.ceil(from / step) * step; time <= to; time += step) {
    const [day, clock] = new Date(1000 * time).toISOString().split("T");
    found.push({ time, text: step >= 86400 || clock.startsWith("00:00") ? day.slice(5) : clock.slice(0, 5) });
  }
  return found;
}
