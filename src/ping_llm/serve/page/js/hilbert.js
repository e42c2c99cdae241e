// A number of 2k bits in, its place on a Hilbert curve of order k out.

/** Column and row; the curve begins in the upper left corner and ends in the upper right one. */
export function hilbert(number, order) {
  let [x, y] = [0, 0];
  for (let level = 0; level < order; level++) {
    const side = 2 ** level;
    const quadrant = Math.floor(number / 4 ** level) % 4;
    const right = quadrant >> 1;
    const down = (quadrant ^ right) & 1;
    if (!down) {
      if (right) [x, y] = [side - 1 - x, side - 1 - y];
      [x, y] = [y, x];
    }
    x += side * right;
    y += side * down;
  }
  return [x, y];
}
