"""The results of PingBench in, report.md out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ping_llm.eval.bootstrap import LEAST_CLUSTERS
from ping_llm.eval.queries import EXTERNAL, SPLITS, VAL_SPLITS
from ping_llm.eval.results import PRIMARY_CONTEXTS
from ping_llm.system.files import write_atomically

REPORT_NAME = "report.md"
DETAIL_KS = (0, 10, 30)
_EMPTY = "–"
_FAMILY = {"ping": "pings", "target": "targets of traceroutes"}


def write_report(results: Mapping[str, Any], out: Path, pictures: Sequence[Path] = ()) -> None:
    """Writes report.md into a folder."""
    sections = {
        "What is queried": _splits(results),
        "Primary result": _summary(results, "primary", _PRIMARY),
        "The repeat task": _summary(results, "repeat", _REPEAT),
        "Targets of traceroutes": _summary(results, "target", _TARGET),
    }
    tested = [split for split in dict.fromkeys(cell["split"] for cell in results["cells"]) if split not in VAL_SPLITS]
    sections |= {split: _split(results, split) for split in tested}
    sections |= {
        "Failures": _failures(results),
        "What the model says of other fields": _other_fields(results),
        "Val, which methods were fitted on": _val(results),
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
        "With a query, the latest k measurements of its source address are given, all earlier than the query: of any",
        "destination (`recent`), or of others than the query's (`other`); of these what fits in the model's prompt, or in",
        "--seq-len tokens. Every source weighs the same. CRPS is in log-ms, lower is better. 95 % intervals come from 1,000",
        f"draws of sources and destination prefixes; with fewer than {LEAST_CLUSTERS} of either, a number has none.",
    ]


def _splits(results: Mapping[str, Any]) -> list[str]:
    """How many measurements, queries, sources, prefixes and pairs each number rests on."""
    rows = []
    for band, families in results["splits"].items():
        for family, splits in families.items():
            for number, one in splits.items():
                counts = (f"{one[name]:,}" for name in ("queries", "sources", "prefixes", "pairs"))
                context = (_percent(one["full_context_share"][draw]["10"], 0) for draw in ("recent", "other"))
                part = number if band == number else f"{band}-{number}"
                eligible = f"{one['eligible']:,}", _percent(one["new_source_share"], 0)
                rows.append((_FAMILY[family], part, f"{one['measurements']:,}", *eligible, *counts, *context))
    head = (
        "",
        "part",
        "measurements",
        "eligible",
        "of new source addresses",
        "queries",
        "sources",
        "prefixes",
        "pairs",
    )
    return [
        "A measurement is eligible if train holds, by address, what the part's name says: s1 the pair, s2 both endpoints,",
        "s3 the destination alone, s4 the source alone, s5 neither. Prefixes are /24 and /48 of destinations. The last",
        "columns say how many queries have 10 earlier measurements to be given.",
        "",
        *_table((*head, "10 recent", "10 other"), rows),
    ]


_PRIMARY = (
    "CRPS of each method ÷ that of the comparator: the baseline that was best in the same cell of val or, where that has",
    f"fewer than {LEAST_CLUSTERS} sources or prefixes, in all cells of val with the same context. In brackets: ÷ that of",
    "the baseline that turned out best in this cell, which nobody could have known.",
)
_REPEAT = (
    "The context may hold earlier pings of the very pair: repeating them is hard to beat. CRPS ÷ the comparator's, and in",
    "brackets ÷ the best baseline's.",
)
_TARGET = ("The same ten numbers for replies of the targets of traceroutes, given earlier ones.",)


def _summary(results: Mapping[str, Any], name: str, what: Sequence[str]) -> list[str]:
    """One of the summaries of results: a line for each cell, a column for each method that is no baseline."""
    summary, kinds = results[name], {name: one["kind"] for name, one in results["methods"].items()}
    if not summary["cells"]:
        return ["No cell of it holds an answered query and a baseline to compare with."]
    shown = [method for method in summary["methods"] if kinds[method] != "baseline"] or ["stack"]
    shown = [method for method in shown if method in summary["methods"]]
    rows = []
    for place, cell in enumerate(summary["cells"]):
        found = (summary["methods"][method] for method in shown)
        numbers = (
            f"{_within(one['ratio'][place], one['interval'][place])} [{_number(one['ratio_best'][place])}]"
            for one in found
        )
        basis = f"{cell['answered']:,} of {cell['sources']} sources to {cell['prefixes']} prefixes"
        rows.append((cell["split"], cell_name(cell), cell["comparator"], basis, *numbers))
    means = (summary["methods"][method] for method in shown)
    mean = (f"**{_within(one['geometric_mean'], one['geometric_mean_interval'])}**" for one in means)
    missing = _missing(summary["cells"]) if name != "repeat" else []
    of = f"of {len(summary['cells'])} cells" + (f" of {len(missing) + len(summary['cells'])}" if missing else "")
    rows.append(("**geometric mean**", of, "", "", *mean))
    lines = list(what) if set(shown) - {"stack"} else [*what, "No model was evaluated."]
    lines += [f"Not here, or without an answer: {', '.join(missing)}."] if missing else []
    if any(None in summary["methods"][method]["interval"] for method in shown):
        lines.append(
            f"(—): no interval, as the cell, or one of the mean, has fewer than {LEAST_CLUSTERS} sources or prefixes."
        )
    return [*lines, "", *_table(("part", "given", "comparator", "answers", *shown), rows)]


def _missing(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of the ten cells of the primary result that are not there; none of other rows, which have no splits."""
    if any(cell["split"] == EXTERNAL for cell in cells):
        return []
    found = {(cell["split"], cell["draw"], cell["k"]) for cell in cells}
    splits = VAL_SPLITS if cells[0]["split"] in VAL_SPLITS else SPLITS
    wanted = [(split, draw, k) for draw, k in PRIMARY_CONTEXTS for split in splits]
    return [
        f"{split} {cell_name({'draw': draw, 'k': k})}" for split, draw, k in wanted if (split, draw, k) not in found
    ]


_DETAILS = (
    "The comparator and every method that is no baseline, on queries that got an answer: NLL; relative errors",
    "of the median, and how many are small; how often the central 50, 80 and 90 % of the distribution hold the RTT.",
)


def _split(results: Mapping[str, Any], name: str) -> list[str]:
    lines = []
    for family, title in _FAMILY.items():
        cells = [cell for cell in results["cells"] if (cell["split"], cell["family"]) == (name, family)]
        if cells:
            lines += [f"### {name}, {title}", "", "CRPS of every method in every cell; the comparator's is bold.", ""]
            lines += [*_crps(cells), "", *_DETAILS, "", *_details(results, cells), ""]
    return lines


def _val(results: Mapping[str, Any]) -> list[str]:
    cells = [cell for cell in results["cells"] if cell["split"] in VAL_SPLITS]
    lines = ["<details><summary>CRPS on val</summary>", ""]
    for split, family in dict.fromkeys((cell["split"], cell["family"]) for cell in cells):
        of_split = [cell for cell in cells if (cell["split"], cell["family"]) == (split, family)]
        lines += [f"### {split}, {_FAMILY[family]}", "", *_crps(of_split), ""]
    return [*lines, "</details>"] if cells else []


def _crps(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each method; the comparator of a cell is bold."""
    rows = []
    for name in cells[0]["methods"]:
        crps = ((_number(cell["methods"][name]["crps_log"]), name == cell["comparator"]) for cell in cells)
        rows.append((name, *(f"**{text}**" if best else text for text, best in crps)))
    rows.append(("measurements given", *(_number(cell["context_fitted"]) for cell in cells)))
    return _table(("CRPS, log-ms", *map(cell_name, cells)), rows)


def _within(value: float | None, interval: Sequence[float | None] | None) -> str:
    bounds = f"{_number(interval[0])}–{_number(interval[1])}" if interval else "—"
    return f"{_number(value)} ({bounds})"


def _details(results: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of some cells: the comparator, and every method that is no baseline."""
    rows = []
    for cell, name, line in _shown_lines(results, cells):
        shares = [line["median_rel_error"], line["p90_rel_error"], *line["within"].values()]
        cover = " / ".join(_percent(share, 0) for share in line["coverage"].values())
        numbers = (_number(line["rtt_nll_nats"]), _number(line["rtt_bits"]), *map(_percent, shares), cover)
        rows.append((cell_name(cell), name, *numbers, _number(line["width_log"]["90"]), _number(line["pit_ks"])))
    head = ("", "method", "NLL nats", "bits/RTT", "median err", "p90 err", "≤ 10 %", "≤ 25 %")
    return _table((*head, "50/80/90 % cover", "width 90 %", "PIT KS"), rows)


def _failures(results: Mapping[str, Any]) -> list[str]:
    """One line for all baselines of a cell that have the same chances of failure, as those with smoothed rates have."""
    keys, rows = ("fail_rate", "fail_brier", "fail_log_loss", "fail_auc"), []
    kinds = {name: one["kind"] for name, one in results["methods"].items()}
    for cell in results["cells"]:
        if cell["draw"] == "other" or cell["split"] in VAL_SPLITS or cell["k"] not in DETAIL_KS:
            continue
        names = dict[tuple[Any, ...], list[str]]()
        for name, line in cell["methods"].items():
            names.setdefault((kinds[name], *(line[key] for key in keys)), []).append(name)
        part = cell["split"] if cell["family"] == "ping" else f"{cell['split']}, {cell['family']}"
        for (_, rate, *scores), same in names.items():
            label = same[0] if len(same) == 1 else f"{same[0]} and {len(same) - 1} more"
            rows.append((part, cell_name(cell), label, _percent(rate), *map(_number, scores)))
    lines = ["How well the chance that a query gets no answer is known; of Brier and log-loss less is better.", ""]
    return [*lines, *_table(("part", "", "method", "base rate", "Brier", "log-loss", "AUC"), rows)]


def _shown_lines(
    results: Mapping[str, Any], cells: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], str, Mapping[str, Any]]]:
    """Of cells with DETAIL_KS: the cell, its comparator and every method that is no baseline, and the line of each."""
    others = [name for name, one in results["methods"].items() if one["kind"] != "baseline"]
    for cell in cells:
        for name in (cell["comparator"], *others) if cell["k"] in DETAIL_KS else ():
            if name is not None:
                yield cell, name, cell["methods"][name]


def _other_fields(results: Mapping[str, Any]) -> list[str]:
    """Of results with a model: losses, orders and destinations."""
    if "loss_per_field" not in results:
        return []
    losses = results["loss_per_field"]
    fields = list(dict.fromkeys(name for line in losses.values() for name in line))
    of_losses = [(part, *(_number(line.get(name)) for name in fields)) for part, line in losses.items()]
    orders = results.get("order_consistency", {}).items()
    of_orders = [(split, _number(one["std_nats"]), f"{one['measurements']:,}") for split, one in orders]
    of_destinations = []
    for split, one in results.get("destinations", {}).items():
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
    chosen |= {"failures, of all baselines": results["failures"]} if results["failures"] else {}
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
        write_atomically(path, json.dumps(lines, indent=1) + "\n")


def _number(value: float | None) -> str:
    if value is None:
        return _EMPTY
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _percent(value: float | None, digits: int = 1) -> str:
    return _EMPTY if value is None else f"{100 * value:.{digits}f} %"
