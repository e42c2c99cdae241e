// Numbers and times in, short text out.

const THIN = "\u202f";

/** Four digits of a number of ms. */
export function ms(value) {
  if (value == null) return "–";
  return value >= 1000 ? Math.round(value).toLocaleString("en") : value.toPrecision(4);
}

/** From one number of ms to another. */
export const band = (low, high) => (low == null ? "–" : `${ms(low)} – ${ms(high)}`);

/** A probability. */
export function percent(p) {
  const of = 100 * p;
  if (of > 0 && of < 0.01) return `<${THIN}0.01${THIN}%`;
  if (of > 99.99 && of < 100) return `>${THIN}99.99${THIN}%`;
  const digits = of === 0 || of === 100 ? 0 : of < 1 || of > 99 ? 2 : 1;
  return `${of.toFixed(digits)}${THIN}%`;
}

/** Odds of a probability, of the larger to the smaller part. */
export function odds(p) {
  if (p <= 0 || p >= 1) return "";
  const ratio = p >= 0.5 ? p / (1 - p) : (1 - p) / p;
  const text = ratio >= 1000 ? "over 999" : ratio >= 10 ? ratio.toFixed(0) : ratio.toFixed(1);
  return p >= 0.5 ? `${text} : 1` : `1 : ${text}`;
}

export const count = (n) => n.toLocaleString("en");

/** `one` or several of a thing. */
export const several = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

/** Day and time of ISO 8601. */
export const when = (iso) => (iso ? iso.replace("T", " ").replace(/(:\d\d)(\.\d+)?(Z|\+00:00)$/, "$1") : "");

export const iso = (seconds) => new Date(1000 * seconds).toISOString().replace(".000Z", "Z");
