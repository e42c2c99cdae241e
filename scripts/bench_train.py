"""Prints how fast training is and where the time of a step goes, each speed as a ratio to a second thing in the same run.

    python scripts/bench_train.py [--rows DIR] [--cases NAME…] [--quick] [--json FILE]

On a GPU: small with 64 windows of 1,024 tokens, full with as many as fit, and steps of other forms against that of small;
else tiny, which --quick cuts to one layer and 4 windows: that shows that everything runs, not how fast. The keys at the top
of the JSON are of small-64, or tiny:

tokens_per_s       on batches that lie on the device, padding counted
mfu                6 FLOPs a multiplied weight plus attention, over the data sheet's bf16 peak; where there is none, over
                   the largest rate of one matrix product in this run (mfu_of says which)
optimizer_share    Muon and AdamW, of a step
data_wait_share    of steps that the loader feeds, from DIR or from synthetic rows; null where it cannot run
peak_memory_gb     allocated on the GPU, or by the process
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from ping_llm.cli import exit_code
from ping_llm.config import Config, load_config
from ping_llm.system.files import try_file

CONFIGS = Path(__file__).parents[1] / "configs"
CASES = {"small-32": 32, "small-64": 64, "full": None, "tiny": None}  # windows in a step; None = as the file says
HEADLINES = ("small-64", "tiny")
LARGEST = "full"  # with as many windows as fit
VARIANTS = "variants"  # no case of its own: the step of the headline case in other forms
HEADLINE = ("tokens_per_s", "mfu", "optimizer_share", "data_wait_share", "peak_memory_gb")
ROWS = {  # of the table: what is printed, where it stands in a case, how
    "tokens/s": ("tokens_per_s", "{:,.0f}"),
    "step, ms": ("step_ms", "{:.1f}"),
    "MFU": ("mfu", "{:.1%}"),
    "MFU of one matrix product": ("mfu_of_matmul", "{:.1%}"),
    "compiled ÷ eager step": ("compiled_to_eager", "{:.2f}"),
    "compile time, s": ("compile_s", "{:.0f}"),
    "peak memory, GB": ("peak_memory_gb", "{:.1f}"),
    "optimiser, share of a step": ("optimizer_share", "{:.1%}"),
    "optimiser launched without the GPU at work": ("optimizer.overhead_share", "{:.0%}"),
    "Muon ÷ torch.optim.Muon": ("muon_to_torch", "{:.2f}"),
    "loader-fed ÷ synthetic tokens/s": ("loader.fed_to_synthetic", "{:.2f}"),
    "waiting for data, share of a step": ("data_wait_share", "{:.1%}"),
    "a save in 200 steps, share of their time": ("save.share", "{:.2%}"),
    "step beside a save ÷ alone": ("save.step_beside_to_alone", "{:.2f}"),
    "GPU at work, share of a step": ("profile.busy_share", "{:.1%}"),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="folder that `ping-llm prepare` wrote; synthetic rows if absent")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, VARIANTS], metavar="NAME", help="only these")
    parser.add_argument("--quick", action="store_true", help="the headline case with fewer steps; on a CPU cut down")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well, after each case")
    options = parser.parse_args(argv)
    try_file(options.json)
    with tempfile.TemporaryDirectory() as scratch:
        # Empty, so that the compile time is that of a first run.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(scratch) / "compiled")
        report = measure(options, Path(scratch))
    print(json.dumps({key: report[key] for key in HEADLINE if key in report}, indent=1))


def measure(options: argparse.Namespace, scratch: Path) -> dict:
    """All numbers; prints them and writes them as they come."""
    from profile_training import Effort, attention_ratios, matmul_peak
    from train_variants import variant_ratios

    from ping_llm.system.hardware import machine_facts, pick_device

    device = pick_device("auto")
    on_gpu = device.type == "cuda"
    names = options.cases or usual_cases(on_gpu, options.quick)
    effort = Effort(rounds=3, steps=2, blocks=1, saves=1) if options.quick else Effort()
    load_before, product = os.getloadavg()[0], matmul_peak(device)
    report = machine_facts(device) | {"load_average_before": load_before, "matmul": product}
    report["mfu_of"] = "data sheet" if report["peak_flops"] else f"{product['dtype']} matrix product of this run"
    print(f"{report['device']}, torch {report['torch']}, load {load_before:.1f}; MFU is of the {report['mfu_of']}")
    print(f"one {product['dtype']} product of {product['size']}³: {product['flops'] / 1e12:.2f} TFLOP/s", flush=True)
    rows, no_rows = (options.rows, None) if options.rows else make_rows(scratch, options.quick)
    report["cases"] = []
    for name in (name for name in names if name != VARIANTS):
        config = config_of(name)
        if options.quick and not on_gpu:
            config = cut_down(config)
        case = measure_case(name, config, device, effort, product["flops"], rows, no_rows)
        report["cases"].append(case)
        headline = next((case for case in report["cases"] if case["name"] in HEADLINES), case)
        report |= {key: headline[key] for key in HEADLINE}
        print_case(case)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1))
    if VARIANTS in names:
        config = config_of("small-64" if on_gpu else "tiny")
        report["variants"] = variant_ratios(
            cut_down(config) if options.quick and not on_gpu else config, device, effort
        )
        print_variants(report["variants"])
    if on_gpu:
        report["sdpa_to_default"] = attention_ratios(config_of("small-64"), device, effort)
        print("SDPA ÷ its default choice:", json.dumps(report["sdpa_to_default"]))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return report


def usual_cases(on_gpu: bool, quick: bool) -> list[str]:
    """What is measured if nobody chooses."""
    if not on_gpu:
        return ["tiny"]
    return ["small-64"] if quick else ["small-64", LARGEST, VARIANTS]


def config_of(name: str) -> Config:
    """The config whose file a case is named after, with the windows of the case in a step."""
    config = load_config(CONFIGS / f"{name.split('-')[0]}.toml")
    batch_size = CASES[name] or config.train.batch_size
    return dataclasses.replace(config, train=dataclasses.replace(config.train, grad_accum=1, batch_size=batch_size))


def cut_down(config: Config) -> Config:
    """One layer and 4 windows of it."""
    model, train = dataclasses.replace(config.model, n_layer=1), dataclasses.replace(config.train, batch_size=4)
    return dataclasses.replace(config, model=model, train=train)


def measure_case(
    name: str, config: Config, device, effort, matmul_flops: float, rows: Path | None, no_rows: str | None
) -> dict:
    """One case on synthetic batches, and fed by the loader."""
    import torch
    from profile_training import free_memory, largest_batch, profile_training, with_train

    started = time.perf_counter()
    if name == LARGEST and device.type == "cuda":
        config = with_train(config, batch_size=largest_batch(config.model, device))
        effort = dataclasses.replace(effort, rounds=3, steps=3, blocks=0, saves=0)
    while True:
        try:
            training, case = profile_training(config, device, effort, matmul_flops)
            break
        except torch.OutOfMemoryError:
            if config.train.batch_size == 1 or name != LARGEST:
                raise
        free_memory()
        config = with_train(config, batch_size=config.train.batch_size // 2)
    if effort.blocks:
        case["loader"] = fed(training, rows, effort) if rows else {"skipped": no_rows}
    else:
        case["loader"] = {"skipped": f"they are measured with {HEADLINES[0]}"}
    case["data_wait_share"] = case["loader"].get("data_wait_share")
    del training
    free_memory()
    return {"name": name, "seconds": time.perf_counter() - started} | case


def fed(training, rows: Path, effort) -> dict:
    """The loader's numbers, or why there are none."""
    from profile_training import profile_loader

    try:
        return profile_loader(training, rows, effort)
    except ModuleNotFoundError as error:
        return {"skipped": f"no module {error.name} here"}


def make_rows(scratch: Path, quick: bool) -> tuple[Path | None, str | None]:
    """Synthetic rows, or why there are none."""
    try:
        from ping_llm.data.ingest.prepare import prepare
        from ping_llm.data.synthetic.synthesize import synthesize

        size = {"probes": 30, "targets": 20} if quick else {"probes": 60, "targets": 50}
        synthesize(scratch / "dump", days=1.0, workers=1, **size)
        prepare([scratch / "dump"], scratch / "rows", workers=1)
    except ModuleNotFoundError as error:
        return None, f"no module {error.name} here; pass --rows"
    return scratch / "rows", None


def print_case(case: dict) -> None:
    """A table of the numbers and one of what takes the most time."""
    from profile_training import markdown_table

    title = f"{case['name']}, {case['batch_size']} × {case['seq_len']}, {case['precision']}, {case['steps']}"
    print("\n" + markdown_table((title, ""), [(label, cell(case, *place)) for label, place in ROWS.items()]))
    if "skipped" in case["loader"]:
        print(f"no batches of the loader: {case['loader']['skipped']}")
    if case["not_compiled"]:
        print(f"not compiled: {case['not_compiled']}")
    top = [
        (f"`{kernel['name'][:70]}`", f"{kernel['share']:.1%}", f"{kernel['calls_per_step']:.0f}")
        for kernel in case["profile"]["top"]
    ]
    print("\n" + markdown_table(("by its own time", "share", "calls a step"), top) + "\n", flush=True)


def print_variants(found: dict) -> None:
    """A table of what a step takes in other forms."""
    from profile_training import markdown_table

    title = f"{found['layers']} layers, {found['batch_size']} windows; a step in another form ÷ as it is"
    rows = [(name, "–" if ratio is None else f"{ratio:.3f}") for name, ratio in found["ratios"].items()]
    print("\n" + markdown_table((title, ""), rows) + "\n", flush=True)
    for name, reason in found["skipped"].items():
        print(f"{name}: skipped, {reason}", flush=True)


def cell(case: dict, place: str, form: str) -> str:
    """One value of a case as text; – where it was not measured."""
    for key in place.split("."):
        case = case.get(key) if case is not None else None
    return "–" if case is None else form.format(case)


if __name__ == "__main__":
    sys.exit(exit_code(main))
