"""A run in; pictures and numbers of what happens within its model out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm.data import tokenization as tk
from ping_llm.data.loader import fixed_windows
from ping_llm.data.rows import MANIFEST_NAME, RowReader
from ping_llm.inference.model import PingModel
from ping_llm.inference.prompt import build_prompt, byte_tokens
from ping_llm.inference.query import Query
from ping_llm.inference.sources import load
from ping_llm.inside.attention import AttentionByField, answered, attention_by_field
from ping_llm.inside.layout import Layout
from ping_llm.inside.path import TokenPath, measurement_path
from ping_llm.inside.plots import plot_ages, plot_attention, plot_path, plot_prefixes
from ping_llm.inside.prefixes import PrefixMap, imagined_prefixes, measured_prefixes, prefix_maps
from ping_llm.system.files import try_folder, write_atomically

FOLDER_NAME, DATA_NAME = "inside", "inside.json"
PICTURES = ("path.png", "attention.png", "attention_ages.png", "prefixes.png")


@dataclass(frozen=True, eq=False)
class Look:
    """What was found within a model."""

    ping: str  # the measurement whose path it is
    path: TokenPath
    attention: AttentionByField
    maps: list[PrefixMap]

    def to_json(self) -> dict[str, Any]:
        """All numbers, as JSON can say them."""
        path = {"ping": self.ping} | self.path.to_json()
        values = {"path": path, "attention": self.attention.to_json(), "prefixes": [one.to_json() for one in self.maps]}
        return _plain(values)

    def lines(self) -> list[str]:
        """What the pictures show, in words."""
        found = self.attention
        means = found.shares.mean(axis=(0, 1)).sum(axis=-1)  # (A, 2): over layers and bytes
        own, other, same = means[0].sum(), means[1:, 0].sum(), means[1:, 1].sum()
        lines = [
            f"path of {self.ping}: two components hold {self.path.shares.sum():.0%} of the variance",
            f"attention where {found.results:,} RTTs are predicted, mean over layers: {own:.0%} to their own measurement, "
            f"{same:.0%} to earlier ones of the same destination, {other:.0%} to other earlier ones",
        ]
        for one in self.maps:
            family = "IPv4" if one.prefixes.ends[0].family == "ipv4" else "IPv6"
            told = f"the nearest five explain {max(one.explained, 0):.0%} of the variance of log median RTT"
            lines.append(f"map of {len(one.places)} {family} prefixes by their {one.of}: {told}")
        return lines

    def draw(self, out: Path, name: str) -> list[Path]:
        """Pictures in a folder, under the names of PICTURES; their paths."""
        found = self.attention
        where = f"attention of {found.results:,} RTTs in %, mean over the heads of a layer"
        earlier = f"{found.least_earlier} or more measurements before each"
        drawn = [
            plot_path(self.path, out / PICTURES[0], f"{name}: the residual stream of {self.ping}"),
            plot_attention(found, out / PICTURES[1], f"{name}: {where}; {earlier}"),
            plot_ages(found, out / PICTURES[2], f"{name}: {where}, where byte 1 is predicted; {earlier}"),
        ]
        if self.maps:
            title = f"{name}: destination prefixes (larger: more replies)"
            drawn.append(plot_prefixes(self.maps, out / PICTURES[3], title))
        return drawn


def inspect_model(
    run: Path,
    out: Path | None = None,
    data: Path | None = None,
    part: str = "val",
    windows: int = 64,
    query: Query | None = None,
    rtt_ms: float | None = None,
    ipv4_bits: int = 24,
    ipv6_bits: int = 48,
    device: str = "auto",
) -> tuple[Look, list[Path]]:
    """Looks into the best checkpoint of a run; pictures and inside.json in `out`, RUN/inside if absent; gives their paths.

    Path and attention are of windows of a part of the rows `data`, those of the run if absent; or, with a query of whole
    bytes, of its context and itself with the result `rtt_ms`, the model's own median if absent. Prefixes are those of the
    part train, or, where there are no rows, the public /8s. ValueError: no run, or neither rows nor a query.
    """
    import matplotlib  # noqa: F401  what is missing is said before anything is done

    if windows < 1:
        raise ValueError(f"--windows {windows} must be at least 1")
    model, config = PingModel.load(run, device), load(run).config
    rows = Path(config.data.rows) if data is None else data
    there = (rows / MANIFEST_NAME).is_file()
    if not there and (data is not None or query is None):
        raise ValueError(f"no rows in {rows}; name them with --data, or name a ping with --src and --dst")
    folder = Path(run) / FOLDER_NAME if out is None else Path(out)
    try_folder(folder, DATA_NAME, *PICTURES)
    if query is None:
        given = [fitting(window, model.seq_len) for window in fixed_windows(config, rows, part, windows).numpy()]
        chosen, _ = answered([Layout.of(window) for window in given])
    else:
        given = [query_window(model, query, rtt_ms)]
        chosen = [[Layout.of(given[0]).measurements - 1]]
    prefixes = measured_prefixes(RowReader(rows, "train"), ipv4_bits, ipv6_bits) if there else imagined_prefixes(model)
    look = look_into(model, given, chosen, [one for some in prefixes for one in prefix_maps(model, some)])
    pictures = look.draw(folder, Path(run).absolute().name)
    write_atomically(folder / DATA_NAME, json.dumps(look.to_json()) + "\n")
    return look, [*pictures, folder / DATA_NAME]


def look_into(
    model: PingModel, windows: Sequence[np.ndarray], measurements: Sequence[Sequence[int]], maps: list[PrefixMap]
) -> Look:
    """Attention of all `measurements` of the windows (T,), and the path of the first one that is known in full."""
    pings = [(number, one) for number, chosen in enumerate(measurements) for one in chosen]
    decoded = [tk.decode(Layout.of(window).tokens.tolist()) for window in windows]
    number, measurement = next((at for at in pings if _is_whole(decoded[at[0]][at[1]])), pings[0])
    ping, path = decoded[number][measurement], measurement_path(model, windows[number], measurement)
    ends = _prefix(ping.src, ping.src_bits), _prefix(ping.dst, ping.dst_bits)
    text = f"{' → '.join(ends)}, {ping.rtt_ms:.4g} ms, after {measurement} measurements"
    return Look(text, path, attention_by_field(model, windows, measurements), maps)


def fitting(window: np.ndarray, seq_len: int) -> np.ndarray:
    """The tokens of a window (T,) of whole measurements, without padding, and without the last one if they are more than
    the model reads: training reads the last token of a window as a target alone."""
    tokens = window[window >= 0]
    if len(tokens) <= seq_len:
        return tokens
    return tokens[: np.flatnonzero(tokens[: seq_len + 1] == tk.MEASUREMENT_START)[-1]]


def _is_whole(ping: tk.Decoded) -> bool:
    """Whether both addresses are known in full, and the time is."""
    return ping.time_s is not None and "/" not in _prefix(ping.src, ping.src_bits) + _prefix(ping.dst, ping.dst_bits)


def _prefix(text: str, bits: int) -> str:
    return text if bits == (128 if ":" in text else 32) else f"{text}/{bits}"


def query_window(model: PingModel, query: Query, rtt_ms: float | None = None) -> np.ndarray:
    """The tokens (T,) of a query's context and of the ping itself with this RTT in ms, by default the model's median.

    ValueError for a query without a source or a destination, or with a prefix that does not end on a byte.
    """
    if query.src is None or query.dst is None:
        raise ValueError("give both --src and --dst: the RTT between them is what is looked from")
    if query.has_partial_byte:
        raise ValueError("give addresses, or prefixes of whole bytes such as /8, /16 or /24")
    if rtt_ms is None:
        rtt_ms = model.rtt_many([query], src_known="all")[0].median
    if not 0 <= rtt_ms < math.inf:
        raise ValueError(f"--rtt {rtt_ms} must be 0 or more ms")
    code = int(tk.encode_rtt(np.array(rtt_ms)))
    prompt = build_prompt(query, model.seq_len - 1).tokens
    return np.array([*prompt, tk.RTT_START, *byte_tokens(code.to_bytes(2, "big"))], dtype=np.int64)


def _plain(value: Any) -> Any:
    """Arrays as lists, and null for what is no finite number."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
