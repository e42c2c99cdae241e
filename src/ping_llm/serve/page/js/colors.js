// A share from 0 to 1 in, a colour that the colour-blind can tell from others out.

// Viridis of matplotlib (S. van der Walt and N. Smith, CC0), at eleven equal steps.
const VIRIDIS = ["440154", "482475", "414487", "355f8d", "2a788e", "21918c", "22a884", "44bf70", "7ad151", "bddf26", "fde725"];
const STOPS = VIRIDIS.map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));

export const mix = (a, b, share) => a.map((value, i) => value + (b[i] - value) * share);

/** Red, green and blue; dark surroundings leave out the darkest, light ones the lightest. */
export function viridis(share, dark) {
  const [low, high] = dark ? [0.14, 1] : [0, 0.92];
  const place = (low + Math.min(Math.max(share, 0), 1) * (high - low)) * (STOPS.length - 1);
  const i = Math.min(Math.floor(place), STOPS.length - 2);
  return mix(STOPS[i], STOPS[i + 1], place - i);
}

export const css = (rgb) => `rgb(${rgb.map(Math.round).join(" ")})`;

/** Relative luminance of sRGB, 0 to 1 (WCAG 2). */
export function luminance(rgb) {
  const [r, g, b] = rgb.map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** The colour behind a node. */
export function surface(node) {
  return getComputedStyle(node).backgroundColor.match(/[\d.]+/g).slice(0, 3).map(Number);
}
