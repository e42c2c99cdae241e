"""The command line of `ping-llm export` in, a folder or a model of the hub out; the signature is what `--help` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


def export(
    source: Annotated[Positional[str], tyro.conf.arg(name="run")],
    to: Path | None = None,
    push: str = "",
    public: Flag = False,
    dtype: Literal["fp32", "bf16"] = "fp32",
    rows: Path | None = None,
    results: Path | None = None,
    license: str = "",
) -> None:
    """Write a trained model as a folder for transformers, and put it onto the Hugging Face hub.

    Args:
        source: run folder of a trained model, or one of its checkpoints; or a folder that was exported, to push it.
        to: new folder for the export.
        push: OWNER/NAME on the hub, with the token in HF_TOKEN or of `hf auth login`.
        public: anyone may see a new model of the hub; else only its owner.
        dtype: bf16 halves the file and rounds the weights; answers are close, not the same.
        rows: folder of the rows of the run: the card says what they hold and, where the weights are rounded or there is
            no calibration, one is fitted, on val, to the weights as they are written.
        results: folder of an evaluation for the card; RUN/eval if absent.
        license: of the weights, for the card, such as mit or cc-by-4.0.
    """
    from ping_llm.inference.sources import is_export, is_of_hub

    if to is None and not push:
        raise ValueError("give --to DIR, a new folder for the export, or --push OWNER/NAME for one that is there")
    if to is None and (is_of_hub(source) or not is_export(Path(source))):
        raise ValueError(f"{source} is no exported folder; with --to DIR it becomes one, which is then pushed")
    if public and not push:
        raise ValueError("--public says who sees what is pushed; give --push OWNER/NAME too, or leave it out")
    if push:
        from ping_llm.hf.hub import check_name

        check_name(push)
    folder = Path(source)
    if to is not None:
        from ping_llm.hf.export import export as write

        folder = write(source, to, dtype, rows, results, license, address=push)
        print(f"exported: {folder}")
    elif rows or results or license or dtype != "fp32":
        raise ValueError(
            "--dtype, --rows, --results and --license go with --to: a folder that is there is pushed as it is"
        )
    if push:
        from ping_llm.hf.hub import push as push_folder

        try:
            print(f"pushed: {push_folder(folder, push, public)}")
        except ValueError as error:
            if to is None:
                raise
            raise ValueError(
                f"{error}. The export is whole: ping-llm export {to} --push {push} repeats the push"
            ) from None
