"""Draws the pictures of docs/how.md: the tokens of a query, what their embedding says, its two passes, its mixture.

    python scripts/draw_docs.py [--demo out/demo] [--out docs/pictures]

The demo's folder, as `make demo` leaves it, holds the model that answers, its Internet and its rows. Addresses are made up.
"""

from __future__ import annotations

import argparse
import datetime as dt
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from ping_llm import PingModel, Query, RTTDistribution
from ping_llm.cli import exit_code
from ping_llm.data import tokenization as tk
from ping_llm.data.synthetic.truth import Truth
from ping_llm.demo import History
from ping_llm.inference.context import Context
from ping_llm.inference.prompt import build_prompt
from ping_llm.inference.query import known_lengths, known_name
from ping_llm.model.legal import LEAST_BYTES, MOST_BYTES
from ping_llm.system.axes import label_log_ticks
from ping_llm.system.files import try_folder

matplotlib.use("Agg")
matplotlib.rcParams |= {
    "svg.hashsalt": "ping-llm",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
import matplotlib.pyplot as plt  # noqa: E402  after the backend is chosen

FIELD_COLORS = {"structure": "#d0d7de", "src": "#9ecbff", "dst": "#d2b8f9", "time": "#ffe2a8", "rtt": "#aceebb"}
FIELDS = tuple(FIELD_COLORS)
SHORT = {tk.TIMESTAMP_ABS: "TIME", tk.TIMESTAMP_DELTA1: "Δ1", tk.TIMESTAMP_DELTA4: "Δ4", tk.MEASUREMENT_START: "START"}
MODEL, TRUTH, LINES = "#1f6feb", "#d1660f", "#57606a"
EARLIER = 3  # pings that the picture of the mixture is given
TRIED = 100  # pings of a part, of which one is drawn
LEAST_SHOWN = 2e-3  # probability of a byte 1 at the edge of the picture
BINS = 160


def main(argv: list[str] | None = None) -> None:
    """Draws all four."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("out/demo"), help="what make demo left")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder for the pictures")
    options = parser.parse_args(argv)
    try_folder(options.out)
    model, history = PingModel.load(options.demo / "run", device="cpu"), History.load(options.demo / "rows")
    truth = Truth.load(options.demo / "dump")
    known, unfamiliar = _queries(history, "test-s2"), _narrowed(model, _queries(history, "test-s3"))
    draw_tokens(known[0], model.seq_len, options.out / "tokens.svg")
    draw_fields(options.out / "fields.svg")
    query, found = _spread_over_bytes(model, known)
    draw_passes(model, query, found, _true(truth, query), options.out / "passes.svg")
    draw_mixture(model, unfamiliar, _true(truth, unfamiliar), options.out / "mixture.svg")


def _queries(history: History, part: str) -> list[Query]:
    """IPv4 pings of a part as queries, each with the last pings of the same source before it as context."""
    queries = []
    for place in history.queries(part, TRIED):
        src, dst, time_s = history.endpoints(place)
        context = Context.of_measurements(history.context(place), one_host=True)
        context = context.take(np.flatnonzero((context.src == _packed(src)).all(axis=1))[-EARLIER:])
        if ":" not in src and len(context) == EARLIER:
            queries.append(Query.parse(src, dst, time_s, context))
    if not queries:
        raise ValueError(f"no IPv4 ping of {part} has {EARLIER} earlier pings; give the folder that make demo leaves")
    return queries


def _without_context(model: PingModel, queries: list[Query], src_known: str) -> list[RTTDistribution]:
    return model.rtt_many([Query.parse(str(query.src), str(query.dst), query.time_s) for query in queries], src_known)


def _spread_over_bytes(model: PingModel, queries: list[Query]) -> tuple[Query, RTTDistribution]:
    """A query with an answer that is spread over several values of byte 1, all of its source known, and the answer."""
    found = _without_context(model, queries, "all")
    p = np.stack([np.asarray(one.code_probability).reshape(256, 256).sum(axis=1) / one.p_answer for one in found])
    evenness = (p**2).sum(axis=1) + [one.p_fail for one in found]
    flattest = int(evenness.argmin())
    return queries[flattest], found[flattest]


def _narrowed(model: PingModel, queries: list[Query]) -> Query:
    """The query whose answer its context narrows the most."""
    both = _without_context(model, queries, "auto"), model.rtt_many(queries, "auto")
    before, after = (np.log([one.quantile(0.95) / one.quantile(0.05) for one in found]) for found in both)
    return queries[int(np.argmax(before / after))]


def _packed(address: str) -> np.ndarray:
    return np.frombuffer(Query.parse(address, None).src.packed, np.uint8)


def _true(truth: Truth, query: Query) -> Any:
    return truth.rtt_distribution(str(query.src), str(query.dst), query.time_s)


def _save(figure: Any, path: Path) -> None:
    """The same bytes whenever it is drawn; a white ground, for dark pages too."""
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def measurements_of(tokens: Sequence[int]) -> list[list[tuple[str, str]]]:
    """The tokens of each measurement: what is written on each, and its field."""
    found: list[list[tuple[str, str]]] = []
    role = tk.MEASUREMENT_START
    for token in map(int, tokens):
        if token >= tk.BYTE_0:
            found[-1].append((str(token - tk.BYTE_0), FIELDS[tk.FIELD_OF_BYTES_AFTER[role]]))
            continue
        role = token
        if role == tk.MEASUREMENT_START:
            found.append([])
        of_bytes = FIELDS[tk.FIELD_OF_BYTES_AFTER[role]]
        name = SHORT.get(role, tk.ROLE_NAMES[role].removesuffix("_START").replace("_", "\n").replace("IPV4", "IPv4"))
        found[-1].append((name, FIELDS[tk.FIELD_OF_ROLE[role]] if role == tk.FAILED else of_bytes))
    return found


def draw_tokens(query: Query, seq_len: int, path: Path) -> None:
    """A measurement of a training window, then the prompt of a query with one earlier ping: a box a token."""
    one = Query.parse(str(query.src), str(query.dst), query.time_s, query.context.take(slice(-1, None)))
    rows = measurements_of(_any_order(one)) + measurements_of(build_prompt(one, seq_len).tokens)
    rows[-1] += [("RTT", "next"), ("?", "next"), ("?", "next")]
    titles = (
        "in training: fields in any order, addresses whole or cut to a prefix, with or without a time; here no answer came",
        "a query: an earlier ping of the source is the context",
        "and the ping whose RTT is wanted comes last",
    )
    figure, axes = plt.subplots(figsize=(11, 3.3), layout="constrained")
    for y, (row, title) in enumerate(zip(rows, titles, strict=True)):
        axes.text(0, -1.6 * y + 0.6, title, fontsize=9, color=LINES, va="bottom")
        for x, (text, field) in enumerate(row):
            style = "--" if field == "next" else "-"
            _box(axes, x, -1.6 * y - 0.45, 0.92, 0.95, FIELD_COLORS.get(field, "white"), style)
            axes.text(x + 0.46, -1.6 * y, text, ha="center", va="center", fontsize=7.5 if len(text) < 6 else 6.3)
    names = {"src": "source", "dst": "destination", "rtt": "result"}
    for x, (name, color) in enumerate(FIELD_COLORS.items()):
        _box(axes, 3.2 * x, -4.5, 0.5, 0.4, color)
        axes.text(3.2 * x + 0.7, -4.3, names.get(name, name), va="center", fontsize=8)
    axes.set(xlim=(-0.1, max(map(len, rows)) + 0.1), ylim=(-4.7, 1.1))
    axes.axis("off")
    _save(figure, path)


def _any_order(query: Query) -> np.ndarray:
    """Tokens of a failed ping of the same ends, the destination first and cut to 16 bits, without a time."""
    assert query.src is not None and query.dst is not None
    src, dst = (np.frombuffer(end.packed, np.uint8)[None] for end in (query.src, query.dst))
    whole, cut, failed = np.array([4]), np.array([2]), np.array([-1.0])
    order = np.array([[2, 0, 1, 3]])  # dst, result, src
    window = tk.Fields(src, dst, whole, cut, failed, np.array([0]), np.array([False]), order, np.array([0]))
    return tk.encode(window)[0]


def _box(axes: Any, x: float, y: float, wide: float, high: float, color: str, style: str = "-") -> None:
    look = {"facecolor": color, "edgecolor": LINES, "linewidth": 0.6, "linestyle": style}
    axes.add_patch(plt.Rectangle((x, y), wide, high, **look))


def field_lines(roles_and_bytes: Sequence[tuple[int, Sequence[int]]]) -> list[tuple[str, str, str, str, str]]:
    """Of each token of some fields: the token, its place, the address so far, the RTT so far, what may come next."""
    lines = []
    for role, values in roles_and_bytes:
        for index in range(len(values) + 1):
            so_far, name = values[:index], tk.ROLE_NAMES[role]
            prefix = ".".join(map(str, so_far)) if role in (tk.SRC_IPV4, tk.DST_IPV4) and so_far else "–"
            rtt = "–"
            if role == tk.RTT_START and so_far:
                first = int(so_far[0]) << 8
                low, high = tk.decode_rtt(np.array([first, first + 255]))
                exact = tk.decode_rtt(np.array([first + so_far[-1]]))[0]
                rtt = f"{low:.4g}–{high:.4g} ms" if index == 1 else f"{exact:.5g} ms"
            may = ["a byte"] * (index < MOST_BYTES[role]) + ["a role"] * (index >= LEAST_BYTES[role])
            lines.append(
                (name if not index else f"byte {so_far[-1]}", f"{name}, {index}", prefix, rtt, " or ".join(may))
            )
    return lines


def draw_fields(path: Path) -> None:
    """What the embedding of each token of a destination and of an RTT says of it."""
    code = int(tk.encode_rtt(np.array([108.3]))[0])
    lines = field_lines([(tk.DST_IPV4, (199, 243, 231, 233)), (tk.RTT_START, divmod(code, 256))])
    heads = ("token", "its place", "address so far", "RTT so far", "next may come")
    figure, axes = plt.subplots(figsize=(9, 3.1), layout="constrained")
    table = axes.table(lines, colLabels=heads, cellLoc="left", loc="center", colWidths=[0.16, 0.2, 0.22, 0.22, 0.2])
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.45)
    for (row, column), cell in table.get_celld().items():
        cell.set(edgecolor="#d0d7de", linewidth=0.6)
        if row == 0:
            cell.set_facecolor("#f6f8fa")
            cell.set_text_props(weight="bold")
        elif column == 0:
            cell.set(facecolor=FIELD_COLORS["dst" if row <= 5 else "rtt"])
    axes.axis("off")
    _save(figure, path)


def draw_passes(model: PingModel, query: Query, found: RTTDistribution, true: Any, path: Path) -> None:
    """The first pass gives byte 1 of the RTT and failure, the second byte 2 after each byte 1, together every RTT."""
    p = np.asarray(found.code_probability).reshape(256, 256)
    byte_1, edges = p.sum(axis=1), tk.rtt_code_edges_ms()
    best = int(byte_1.argmax())
    figure, (first, second, whole) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    shown = np.flatnonzero(byte_1 > LEAST_SHOWN)
    shown = np.arange(max(shown[0] - 1, 0), min(shown[-1] + 2, 256))
    failed = shown[0] - max(2, len(shown) // 8)
    look = {"edgecolor": LINES, "linewidth": 0.4}
    first.bar(shown, byte_1[shown], color=FIELD_COLORS["rtt"], **look)
    first.bar([failed], [found.p_fail], color=FIELD_COLORS["structure"], **look)
    some = shown[1 :: max(1, len(shown) // 5)]
    labels = [f"{value}\n{edges[value << 8]:.3g}" for value in some]
    first.set_xticks([failed, *some], ["no\nanswer", *labels], fontsize=7.5)
    first.set(
        title="pass 1: P(no answer), P(byte 1)",
        xlabel="byte 1 of the RTT, and ms where it begins",
        ylabel="probability",
    )
    second.stairs(p[best] / byte_1[best], fill=True, color=FIELD_COLORS["rtt"])
    second.plot([0, 255], [1 / 256, 1 / 256], color=LINES, linewidth=0.8, linestyle=":")
    span = "byte 2; dotted: all alike\n({:.4g} to {:.4g} ms)".format(*edges[[best << 8, (best + 1) << 8]])
    second.set(title=f"pass 2: P(byte 2 | byte 1 = {best})", xlabel=span)
    low, high = _span(found, true)
    _draw_density(whole, found, (low, high), MODEL, "model")
    _draw_density(whole, true, (low, high), TRUTH, "true distribution", "--")
    whole.set(title="the answer: P(byte 1) · P(byte 2 | byte 1)", xlabel="RTT (ms)", ylabel="density per log-ms")
    _log_axes(whole, low, high)
    whole.legend(frameon=False, fontsize=8)
    figure.suptitle(_title(query), fontsize=9, color=LINES)
    _save(figure, path)


def _title(query: Query) -> str:
    return f"{query.src} → {query.dst}, {dt.datetime.fromtimestamp(query.time_s, dt.UTC):%Y-%m-%d %H:%M} UTC"


def _span(*several: Any) -> tuple[float, float]:
    """RTTs in ms between which nearly all of several distributions lies."""
    return min(one.quantile(0.02) for one in several) * 0.97, max(one.quantile(0.98) for one in several) * 1.03


def _draw_density(
    axes: Any, one: Any, span: tuple[float, float], color: str, label: str, style: str = "-", width: float = 1.5
) -> None:
    edges = np.geomspace(*span, BINS + 1)
    density = np.diff(one.cdf(edges)) / np.diff(np.log(edges))
    axes.plot(np.sqrt(edges[:-1] * edges[1:]), density, color=color, label=label, linestyle=style, linewidth=width)


def _log_axes(axes: Any, low: float, high: float) -> None:
    top = max(line.get_ydata().max() for line in axes.get_lines())
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(top / 1e3, top * 1.6))
    label_log_ticks(axes.xaxis, low, high)


def draw_mixture(model: PingModel, query: Query, true: Any, path: Path) -> None:
    """The answers under each known length of an unfamiliar source, and their mixture, without context and with some."""
    assert query.src is not None
    figure, both = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", sharey=True)
    lengths = known_lengths("auto", query.src)
    colors = plt.colormaps["viridis"](np.linspace(0.05, 0.9, len(lengths)))
    titles = ("no context", f"given {EARLIER} earlier pings of the source")
    span = None
    for axes, context, title in zip(both, (None, query.context), titles, strict=True):
        ends = str(query.src), str(query.dst), query.time_s
        auto = _answer(model, ends, context, "auto")
        span = span or _span(auto, true)
        for length, color in zip(lengths, colors, strict=True):
            name = known_name(query.src.cut(length))
            if weight := auto.src_weights.get(name, 0.0):
                part = _answer(model, ends, context, 8 * length)
                _draw_density(axes, part, span, color, f"{name}: {weight:.0%}", width=0.9)
        _draw_density(axes, auto, span, MODEL, "the answer", width=2.2)
        _draw_density(axes, true, span, TRUTH, "true distribution", "--")
        axes.set(title=title, xlabel="RTT (ms)")
        axes.legend(loc="upper right", fontsize=8, title="known of the source: weight", title_fontsize=8)
    for axes in both:
        _log_axes(axes, *span)
    both[0].set_ylabel("density per log-ms")
    figure.suptitle(f"{_title(query)}: a source that training has not met", fontsize=9, color=LINES)
    _save(figure, path)


def _answer(model: PingModel, ends: tuple, context: Context | None, src_known: str | int) -> RTTDistribution:
    return model.rtt_many([Query.parse(*ends, context)], src_known)[0]


if __name__ == "__main__":
    sys.exit(exit_code(main))
