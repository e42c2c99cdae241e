"""The command line of `ping-llm watch` in, a watch out; the signature is what `--help` shows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ping_llm.watch.atlas import Live
from ping_llm.watch.hysteresis import Rule
from ping_llm.watch.state import Bounds

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
LiveOptions = tyro.conf.OmitArgPrefixes[Live]
RuleOptions = tyro.conf.OmitArgPrefixes[Rule]
BoundsOptions = tyro.conf.OmitArgPrefixes[Bounds]


def watch(
    live: LiveOptions,
    rule: RuleOptions,
    bounds: BoundsOptions,
    model: str | None = None,
    input: Path | None = None,
    replay: tuple[Path, ...] = (),
    speed: float = 0.0,
    out: Path = Path("anomalies.jsonl"),
    every: Flag = False,
    metrics_port: int | None = None,
    src_known: str = "whole",
    memory: Path | None = None,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Score ping results as they come in, and write where the network behaves otherwise than expected, until SIGTERM or
    ctrl-C. Run it again to go on where it stopped. The key of the Atlas API for measurements that are not public is taken
    from the environment variable RIPE_ATLAS_API_KEY.

    Args:
        model: run folder of a trained model, a folder that ping-llm export wrote, or OWNER/NAME of the Hugging Face hub; if
            absent, the model that comes with the package.
        input: read results from a pipe or a file, one a line, of any firmware; - is standard input.
        replay: read results from old dumps, in this order.
        speed: play them so many times as fast as they were measured; 0 is as fast as they can be scored.
        out: file of anomalies, a line for each that opens or closes; OUT.state beside it is what the watch knows.
        every: write a line for every result too.
        metrics_port: port for Prometheus, on 127.0.0.1; 0 takes a free one. It needs the extra serve.
        src_known: how much of the sources is known to the model: whole, or auto, as for score, which is up to five times
            slower; all, none or a prefix length leaves out the experts.
        memory: folder of rows, whose train part knows past results of a pair.
        device: cpu, cuda or auto.
        precision: bf16 is faster; probabilities differ by some percent of themselves.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin would take the time of others
    from ping_llm.data.ingest.fetch import KEY_VARIABLE
    from ping_llm.watch.history import Scorer
    from ping_llm.watch.run import Feed
    from ping_llm.watch.run import watch as run
    from ping_llm.watch.scoring import ModelScorer

    def load() -> Scorer:
        from ping_llm.inference.model import PingModel

        return ModelScorer(PingModel.load(model, device, precision, memory), src_known)

    feed = Feed(input, tuple(replay), speed, live)
    total = run(feed, load, out, rule, bounds, every, metrics_port, os.environ.get(KEY_VARIABLE, "").strip())
    print(summary(total, out))


def summary(total: dict[str, int], out: Path) -> str:
    """What became of the lines."""
    parts = [f"{count:,} {name}" for name, count in sorted(total.items()) if count]
    return f"{sum(total.values()):,} lines: {', '.join(parts) or 'none'}; anomalies in {out}"
