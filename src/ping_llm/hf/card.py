"""What a run left behind in, the model card of its export out: how to ask, data, scores, limits, licence.

Nothing of the machine or its user gets into it: neither paths nor names of hosts and files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ping_llm.config import Config
from ping_llm.data.ingest.fetch import ATTRIBUTION
from ping_llm.data.rows import RowReader
from ping_llm.inference.sources import Loaded
from ping_llm.model.checkpoint import STATE_NAME
from ping_llm.model.counts import parameter_count
from ping_llm.training.base import ROWS_MANIFEST_NAME, Base, read_kept
from ping_llm.training.metrics import COLUMNS, METRICS_NAME, read_metrics

RESULTS_NAME = "results.json"  # of an evaluation
_SHOWN = ("val_loss", "val_loss_rtt", "val_rtt_bits", "val_median_rel_error")
_LICENCE = r"[a-z0-9][a-z0-9.+-]*"
_TAGS = ["ping-llm", "network-latency", "rtt", "ping", "internet-measurement"]
_TEXT = """# {name}

{what}

## How to ask it

```
pip install 'ping-llm[hf]'
```

```python
from ping_llm import PingModel

rtt = PingModel.load("{address}").rtt("192.0.2.1", "198.51.100.7")
rtt.median, rtt.quantile(0.9), rtt.p_fail  # ms, ms, and the probability of no answer
```

`context=` takes earlier pings of the source, `at=` a time; prefixes stand for addresses. `ping-llm inference rtt --model
{address} --src A --dst B` asks from a terminal. {transformers}

## What it was trained on

{data}

## How good it is

{scores}

## Limits

- Far from what it was trained on, an answer is wide on purpose. Earlier pings of the source, as context, make it better.
- It says what a ping would have been at the time of its data, by the ways that packets took then.
- {addresses}
- {weights}

## Licence and source

{licence}
"""


@dataclass(frozen=True)
class Weights:
    """What an export says of its weights."""

    dtype: str
    calibration: str  # what it was fitted to, for people
    nanochat: bool  # whether transformers has the architecture itself


def model_card(
    loaded: Loaded,
    weights: Weights,
    address: str,
    results: Path | None = None,
    licence: str = "",
    rows: Path | None = None,
) -> str:
    """README.md of an export of a model; `address` is what it is loaded by, OWNER/NAME or a folder.

    `results` is the folder of an evaluation; that of the run is looked for where it is None. Of `rows` it says what they
    hold. ValueError: it holds none, a file of the run is damaged, or the metadata are not what the hub takes.
    """
    if licence and not re.fullmatch(_LICENCE, licence):
        raise ValueError(f"--license {licence!r} is no identifier as the hub has them, such as mit, cc-by-4.0 or other")
    run, name = _run_folder(loaded.folder), address.rpartition("/")[2]
    measured = _measured(run, loaded.state)
    bench = _bench(run / "eval" if results is None else results, required=results is not None)
    meta = ModelCardData(
        license=licence or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_TAGS,
        model_name=name,
        eval_results=[_eval_result(key, value) for key, value in measured.items()] or None,
    )
    text = _TEXT.format(
        name=name,
        address=address,
        what=_what(loaded.config),
        transformers=_transformers(address, weights.nanochat),
        data=_data(run, loaded.state) if rows is None else f"{_held(rows)} {_data(run, loaded.state)}",
        scores=_scores(measured, bench),
        addresses=_addresses(loaded),
        weights=f"The weights are kept in {weights.dtype}. {weights.calibration}",
        licence=_licence(licence),
    )
    return str(ModelCard(f"---\n{meta.to_yaml()}\n---\n\n{text}", ignore_metadata_errors=False))


def _run_folder(folder: Path) -> Path:
    """The run that a checkpoint is of; the folder itself otherwise."""
    return folder.resolve().parent.parent if (folder / STATE_NAME).is_file() else folder


def _measured(run: Path, state: Mapping[str, Any]) -> dict[str, float]:
    """What val says of the weights, in the units of COLUMNS; of an export of an export the loss that it carries."""
    step = state.get("step")
    found = {}
    if (run / METRICS_NAME).is_file():
        metrics = read_metrics(run)
        for name in _SHOWN:
            steps, values = metrics.known(name)
            if step in steps:
                found[name] = float(values[steps == step][0]) * COLUMNS[name].scale
    if state.get("val_loss") is not None:
        found.setdefault("val_loss", float(state["val_loss"]))
    return found


def _bench(folder: Path, required: bool) -> list[tuple[str, str, str]]:
    """PingBench's primary result of the model: part and context, comparator, ratio; no lines where there is none."""
    path = folder / RESULTS_NAME
    if not path.is_file():
        if required:
            raise ValueError(f"there is no {path}; name the folder of an evaluation by ping-llm eval")
        return []
    try:
        results = json.loads(path.read_bytes())
        if results["leak"]:
            raise ValueError(results["leak"])
        subject = next(name for name, one in results["methods"].items() if one["kind"] == "model")
        primary = results["primary"]
        own = primary["methods"][subject]
        lines = [
            (f"{cell['split']}, {_context(cell)}", cell["comparator"], f"{ratio:.2f}")
            for cell, ratio in zip(primary["cells"], own["ratio"], strict=True)
        ]
        return [*lines, ("**geometric mean**", "", f"**{own['geometric_mean']:.2f}**")]
    except (ValueError, KeyError, TypeError, StopIteration):
        if required:
            raise ValueError(
                f"{path} holds no scores of a model that did not learn the answers; name another one"
            ) from None
        return []


def _context(cell: Mapping[str, Any]) -> str:
    return "no context" if cell["k"] == 0 else f"{cell['k']} earlier pings"


def _eval_result(name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="tabular-regression",
        task_name="RTT of pings",
        dataset_type="pings",
        dataset_name="val of the rows that it was trained on",
        metric_type=name.removeprefix("val_"),
        metric_name=_label(name),
        metric_value=round(value, 4),
    )


def _label(name: str) -> str:
    return COLUMNS[name].label.replace("\n", " ")


def _what(config: Config) -> str:
    shape = config.model
    size = f"{parameter_count(shape):,} weights, {shape.n_layer} blocks of width {shape.n_embd}"
    return (
        "A model of Internet latency, trained with ping-llm: given a source and a destination it answers with the whole "
        f"distribution of the RTT between them and the probability of no answer. {size}, {shape.seq_len} tokens of context."
    )


def _transformers(address: str, nanochat: bool) -> str:
    trust = "" if nanochat else ", trust_remote_code=True"
    how = f'`AutoModelForCausalLM.from_pretrained("{address}"{trust})` is the bare network for transformers'
    if nanochat:
        return f"{how}, which has this architecture."
    return f"{how}: the Python files here only import the classes of the installed ping-llm."


def _data(run: Path, state: Mapping[str, Any]) -> str:
    facts = []
    if manifest := read_kept(run / ROWS_MANIFEST_NAME):
        parts, split = manifest["parts"], manifest.get("split", {})
        facts.append(f"{parts['train']:,} pings of {len(manifest['inputs']):,} input files")
        if until_s := split.get("val_from_s"):
            facts.append(f"all from before {datetime.fromtimestamp(until_s, UTC):%Y-%m-%d %H:%M} UTC")
        if kept := sum(count for part, count in parts.items() if part != "train"):
            facts.append(f"{kept:,} more were kept apart for val and test")
    if "tokens" in state:
        facts.append(f"{state['tokens']:,} tokens were learned from")
    if not facts:
        return "This export does not say."
    said = "; ".join(facts) + "."
    if base := Base.load(run):
        said += (
            f" These are of its fine-tuning: it began with the weights of another model, after {base.step:,} steps of that "
            "one's own training, and may have been reminded of what that one knew."
        )
    return said


def _held(rows: Path) -> str:
    """Years, sources and destinations of the part train of rows, in numbers."""
    reader, seconds = RowReader(rows, "train"), []
    ends: tuple[set[bytes], set[bytes]] = (set(), set())
    for row in reader:
        times = row.times(slice(None))
        seconds += [int(times.min()), int(times.max())]
        for met, addresses in zip(ends, (row.src_addresses, row.dst_addresses), strict=True):
            met.update(map(bytes, addresses))
    first, last = (f"{datetime.fromtimestamp(s, UTC):%B %Y}" for s in (min(seconds), max(seconds)))
    between = f"from {first} to {last}" if first != last else f"of {first}"
    return f"Pings {between}: {len(ends[0]):,} addresses of sources, {len(ends[1]):,} of destinations."


def _scores(measured: Mapping[str, float], bench: Iterable[tuple[str, str, str]]) -> str:
    lines = ["On val, which no weight has learned from:", "", "| | |", "|---|---:|"]
    lines += [f"| {_label(name)} | {value:.4g} |" for name, value in measured.items()]
    if not measured:
        lines = ["It was not evaluated on val."]
    if bench := list(bench):
        lines += ["", "PingBench, CRPS ÷ that of the baseline that was best on val (below 1 is better):", ""]
        lines += ["| | baseline | model ÷ baseline |", "|---|---|---:|"]
        lines += [f"| {part} | {baseline} | {ratio} |" for part, baseline, ratio in bench]
    return "\n".join(lines)


def _addresses(loaded: Loaded) -> str:
    """What somebody can find out about the hosts that the model has learned from."""
    shape = loaded.config.model
    if (shape.src_bits_ipv4, shape.src_bits_ipv6) == (32, 128):
        said = "It reads sources whole"
    else:
        said = f"Of sources it reads {shape.src_bits_ipv4} bits (IPv4) or {shape.src_bits_ipv6} (IPv6)"
    if loaded.calibration.familiar is not None:
        said += (
            "; calibration.json holds hashes of the prefixes that it met, so who names one can see whether it was there"
        )
    return said + "."


def _licence(licence: str) -> str:
    named = f"Licence of the weights: {licence}." if licence else "Whoever publishes the weights names their licence."
    return f"{named} The code is MIT.\n\nWhere the pings are of RIPE Atlas: {ATTRIBUTION}"
