"""A command line in, a library call out. The signature of each function below is what `--help` shows.

Nothing heavy is imported before the options are parsed, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

_EXTRAS = {"matplotlib": "plots", "lightgbm": "baselines", "transformers": "hf", "dask": "cluster"}
Positional = tyro.conf.Positional


def synth(
    out: Path,
    probes: int = 100,
    targets: int = 50,
    days: float = 2.0,
    seed: int = 0,
    workers: int = 0,
) -> None:
    """Write a synthetic Internet as an Atlas-shaped dump (.bz2), and its exact latency law (truth.json).

    Args:
        out: folder for the dump and truth.json.
        probes: hosts that ping.
        targets: hosts that are pinged.
        days: time that the dump spans.
        seed: the same seed gives the same bytes.
        workers: processes that write files; 0 = one a core.
    """
    from ping_llm.data.synthetic import synthesize

    counts = synthesize(out, probes=probes, targets=targets, days=days, seed=seed, workers=workers)
    print(f"{counts['results']:,} results in {counts['files']} files, and truth.json, in {out}")


def prepare(
    inputs: Positional[tuple[str, ...]],
    out: Path,
    workers: int = 0,
    packets: Literal["one", "all"] = "one",
    split: Literal["pingbench", "none"] = "pingbench",
    keep_going: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Turn Atlas dumps into probe rows, ready for training.

    Args:
        inputs: dumps, or folders of them: NDJSON or JSON arrays, plain or as .bz2, .gz, .zst; - is standard input.
        out: folder for the row shards and manifest.json.
        workers: processes; 0 = one a core.
        packets: keep one packet of each result, chosen by a hash, or all of them.
        split: train, val and test parts by the rules of PingBench, or everything into train.
        keep_going: use what can be read of a damaged file instead of stopping.
    """
    from ping_llm.data.prepare import prepare, summary

    print(summary(prepare(inputs, out, workers, packets, split, keep_going=keep_going)))


def rtt(
    model: Path,
    src: str,
    dst: str = "",
    dst_prefix: str = "",
    at: str = "",
    context: Path | None = None,
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    plot: Path | None = None,
    truth: Path | None = None,
    device: str = "auto",
) -> None:
    """The law of the RTT between two hosts, exactly.

    Args:
        model: run folder of a trained model.
        src: source address, or a prefix such as 192.0.2.0/24.
        dst: destination address.
        dst_prefix: destination prefix such as 198.51.0.0/16, instead of an address.
        at: time of the ping, ISO 8601 (UTC if it names no zone); any time if absent.
        context: earlier measurements of the source (.parquet, .csv, .json): src_addr, dst_addr, rtt, event_time.
        json: print one JSON object.
        plot: draw the density to this image file.
        truth: truth.json of a synthetic dump: its law is drawn, or printed, beside the answer.
        device: cpu, cuda or auto.
    """
    from ping_llm.inference import commands

    if bool(dst) == bool(dst_prefix):
        raise ValueError("give either --dst ADDRESS or --dst-prefix PREFIX/LENGTH")
    commands.rtt(model, src, dst or dst_prefix, at or None, context, json, plot, truth, device)


def _train(argv: list[str]) -> None:
    from ping_llm.config import parse_config

    config = parse_config(argv, "ping-llm train")
    # Threads of OpenMP spin while they wait: with any other work on the machine, training would take ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from ping_llm.trainer import train

    train(config)


def _inference(argv: list[str]) -> None:
    _dispatch(argv, {"rtt": _options(rtt)}, {"rtt": rtt.__doc__}, "ping-llm inference")


def _options(function: Callable[..., None]) -> Callable[[list[str]], None]:
    """A command whose options are the parameters of a function."""
    return lambda argv: tyro.cli(function, args=argv, prog=f"ping-llm {function.__name__}")


_COMMANDS = {"synth": _options(synth), "prepare": _options(prepare), "train": _train, "inference": _inference}
_HELP = {
    "synth": synth.__doc__,
    "prepare": prepare.__doc__,
    "train": "Train a model: CONFIG.toml [--section.option value …].",
    "inference": "Ask a trained model: rtt.",
}


def _dispatch(argv: list[str], commands: dict[str, Callable], help_texts: dict[str, str], prog: str) -> None:
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    lines = [f"  {name:10} {help_texts[name].splitlines()[0]}" for name in commands]
    usage = "\n".join([f"usage: {prog} COMMAND [OPTIONS]   (COMMAND --help says more)", "", *lines])
    if argv and argv[0] in ("-h", "--help"):
        return print(usage)
    if argv:
        raise ValueError(f"no command {argv[0]!r}; there are {', '.join(commands)}")
    print(usage, file=sys.stderr)
    raise SystemExit(2)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 after one line that says what was wrong, 130 if interrupted."""
    try:
        _dispatch(sys.argv[1:] if argv is None else argv, _COMMANDS, _HELP, "ping-llm")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        print(f"error: {error.name} is not installed; pip install 'ping-llm[{_EXTRAS[error.name]}]'", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        if os.environ.get("PING_LLM_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
