"""The results of PingBench in, report.md out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ping_llm.eval.queries import DRAWS, NO_DRAW
from ping_llm.system.files import write_atomically

REPORT_NAME = "report.md"
DETAIL_KS = (0, 5, 30)
FEW = 20_000
_EMPTY = "–"


def write_report(results: Mapping[str, Any], out: Path, pictures: Sequence[Path] = ()) -> None:
    """Writes report.md into a folder."""
    sections = {"Headline": _headline(results)}
    sections |= {name: _split(results, name, split) for name, split in results["splits"].items()}
    sections |= {
        "Failures": _failures(results),
        "What the model says of other fields": _other_fields(results),
        "Settings chosen on val": _choices(results),
        "Pictures": [f"![{picture.stem.replace('_', ' ')}]({picture.name})\n" for picture in pictures],
    }
    text = "# PingBench\n\n" + "\n".join(_head(results)) + "\n"
    text += "".join(f"\n## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in sections.items() if lines)
    write_atomically(out / REPORT_NAME, text)


def subject(results: Mapping[str, Any]) -> str | None:
    """The method that the report is about: the first of the model; None without a model."""
    return next((name for name, one in results["methods"].items() if one["kind"] == "model"), None)


def cell_name(cell: Mapping[str, Any]) -> str:
    """How a table names a cell of a split."""
    return "k = 0" if cell["k"] == 0 else f"{cell['draw']} {cell['k']}"


def _head(results: Mapping[str, Any]) -> list[str]:
    lines = [f"Rows {results['data']}, run {results['run'] or 'none'}, seed {results['seed']}."]
    if results["train_rows"] != results["data"]:
        lines.append(f"Baselines learned from {results['train_rows']}.")
    if results["quick"]:
        lines.append("A quick look: fewer queries, and smaller trees than a full run has.")
    if count := results["model_queries_per_cell"]:
        lines.append(
            f"Tables are over the queries that every method answered: of each cell the first {count:,} at most."
        )
    if leak := results["leak"]:
        warning = f"**LEAK: {leak}. These numbers are no measure of quality.**"
        lines += ["", f'<span style="color:red">{warning}</span>', ""]
    return [
        *lines,
        "",
        "With a query, k earlier measurements of its source are given: the most `recent`, or those of `other` destinations.",
        "Every source weighs the same. CRPS is in log-ms, lower is better; 95 % intervals come from 1,000 draws of sources.",
    ]


def _headline(results: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, line in results["headline"].items():
        cells = f"{line['cells']}" + (f" (+ {line['cells_too_small']} too small)" if line["cells_too_small"] else "")
        ratio = _within(line["geometric_mean"], line["interval"])
        by_draw = (_number(line["by_draw"].get(draw)) for draw in (NO_DRAW, *DRAWS))
        rows.append((name, ratio, *by_draw, f"{line['win_rate']:.0%}", cells))
    if not rows and subject(results):
        return ["No cell has enough answers and sources to count; evaluate more queries of each."]
    if not rows:
        return ["No model was evaluated; the tables show what it would have to beat."]
    head = ("", "CRPS ratio to the best baseline of each cell, geometric mean", "k = 0", *DRAWS, "cells won", "cells")
    return _table(head, rows)


def _split(results: Mapping[str, Any], name: str, split: Mapping[str, Any] | None) -> list[str]:
    cells = [cell for cell in results["cells"] if cell["split"] == name]
    if split is None or not split["queries"] or not cells:
        return ["No measurements, so no queries."]
    drawn = f"{split['queries']:,} queries of {split['sources']:,} sources"
    lines = [f"{drawn}, from {split['measurements']:,} measurements."]
    if split["queries"] < min(FEW, split["wanted"]):
        lines.append(f"Fewer than the {split['wanted']:,} wanted: there are no more, at most 50 a source.")
    small = [cell_name(cell) for cell in cells if not cell["counts"]]
    if small:
        which = "all cells" if len(small) == len(cells) else ", ".join(small)
        lines.append(f"Too few answers or sources to count in the headline: {which}.")
    full = {draw: f"{shares['30']:.0%}" for draw, shares in split["full_context_share"].items()}
    shares = f"{full['recent']} (recent) and {full['other']} (other)"
    lines.append(f"30 earlier measurements were there for {shares} of them.")
    head = ("CRPS, log-ms", *map(cell_name, cells))
    rows = []
    for name in cells[0]["methods"]:
        crps = ((_number(cell["methods"][name]["crps_log"]), name == cell["best_baseline"]) for cell in cells)
        rows.append((name, *(f"**{text}**" if best else text for text, best in crps)))
    if model := subject(results):
        ratios = ((cell["methods"][model]["crps_ratio"], cell["methods"][model]["ratio_interval"]) for cell in cells)
        rows.append(("**ratio to the best baseline**", *(_within(*ratio) for ratio in ratios)))
    return [*lines, "", *_table(head, rows), "", *_details(results, cells)]


def _within(value: float | None, interval: Sequence[float | None]) -> str:
    return f"{_number(value)} ({_number(interval[0])}–{_number(interval[1])})"


def _details(results: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of some cells: the best baseline, and every method that is none."""
    rows = []
    for cell, name, line in _shown_lines(results, cells):
        shares = [line["median_rel_error"], line["p90_rel_error"], *line["within"].values()]
        cover = " / ".join(_percent(share, 0) for share in line["coverage"].values())
        numbers = (_number(line["rtt_nll_nats"]), _number(line["rtt_bits"]), *map(_percent, shares), cover)
        rows.append((cell_name(cell), name, *numbers, _number(line["width_log"]["90"]), _number(line["pit_ks"])))
    head = ("", "method", "NLL nats", "bits/RTT", "median err", "p90 err", "≤ 10 %", "≤ 25 %")
    return _table((*head, "50/80/90 % cover", "width 90 %", "PIT KS"), rows)


def _failures(results: Mapping[str, Any]) -> list[str]:
    rows = []
    for cell, name, line in _shown_lines(results, [cell for cell in results["cells"] if cell["draw"] != "other"]):
        label = "baselines (smoothed rates)" if name == cell["best_baseline"] else name
        scores = (_number(line[key]) for key in ("fail_brier", "fail_log_loss", "fail_auc"))
        rows.append((cell["split"], cell_name(cell), label, _percent(line["fail_rate"]), *scores))
    return _table(("split", "", "method", "base rate", "Brier", "log-loss", "AUC"), rows)


def _shown_lines(
    results: Mapping[str, Any], cells: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], str, Mapping[str, Any]]]:
    """Of cells with DETAIL_KS: the cell, the best baseline and every method that is none, and its line."""
    others = [name for name, one in results["methods"].items() if one["kind"] != "baseline"]
    for cell in cells:
        for name in (cell["best_baseline"], *others) if cell["k"] in DETAIL_KS else ():
            yield cell, name, cell["methods"][name]


def _other_fields(results: Mapping[str, Any]) -> list[str]:
    """Of results with a model: losses, orders and destinations."""
    if "loss_per_field" not in results:
        return []
    losses = results["loss_per_field"]
    fields = list(dict.fromkeys(name for line in losses.values() for name in line))
    of_losses = [(part, *(_number(line.get(name)) for name in fields)) for part, line in losses.items()]
    orders = results["order_consistency"].items()
    of_orders = [(split, _number(one["std_nats"]), f"{one['measurements']:,}") for split, one in orders]
    of_destinations = []
    for split, one in results["destinations"].items():
        for name in ("model", "destination_bayes") if one["queries"] else ():
            hits = (tops.values() for tops in one[name]["hit_rate"].values())
            shares = (" / ".join(_percent(share, 0) for share in of_top) for of_top in hits)
            of_destinations.append((split, name, _number(one[name]["bits"]), *shares, f"{one['queries']:,}"))
    head = ("", "method", "bits per destination", "/8 (v6 /24)", "/16 (/32)", "/24 (/48)", "/32 (/128)", "queries")
    return [
        *("Loss in nats a token, fields in any order, as in training:", "", *_table(("", *fields), of_losses), ""),
        *_table(("", "std of log p(src, dst, rtt) over the six orders, nats", "measurements"), of_orders),
        *("", "0.3 nats or less is good.", ""),
        *("Destinations given source and RTT; hits among the likeliest 1 / 10 / 100:", ""),
        *_table(head, of_destinations),
    ]


def _choices(results: Mapping[str, Any]) -> list[str]:
    chosen = {name: one["choices"] for name, one in results["methods"].items() if one["choices"]}
    return [f"- {name}: " + ", ".join(f"{k} {v}" for k, v in values.items()) for name, values in chosen.items()]


def _table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def print_lines(lines: Sequence[Mapping[str, Any]], path: Path | None = None) -> None:
    """Prints records as a table for a terminal; writes them as JSON to a file as well, if there is one."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    values = [[line.get(name) for name in names] for line in lines]
    rows = [names, *([_number(x) if x is None or isinstance(x, float) else str(x) for x in row] for row in values)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print("\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows))
    if path:
        path.write_text(json.dumps(lines, indent=1) + "\n")


def _number(value: float | None) -> str:
    if value is None:
        return _EMPTY
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _percent(value: float | None, digits: int = 1) -> str:
    return _EMPTY if value is None else f"{100 * value:.{digits}f} %"
