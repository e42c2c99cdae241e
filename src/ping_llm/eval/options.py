"""A command line in, what `ping-llm eval` and scripts/eval_*.py shall do out; --help says what stands here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from tyro.conf import FlagCreatePairsOff, Positional

COUNTS = (0, 1, 2, 5, 10, 30)  # how many measurements are given with a query
QUERIES_PER_SPLIT = 20_000
QUICK_QUERIES, QUICK_MODEL_QUERIES = 2_000, 75
DIAGNOSE_QUERIES = {"destinations": 50, "tokens": 64, "order": 500}


@dataclass(frozen=True)
class PartOptions:
    """A model, and queries of one part of a folder of rows."""

    run: Positional[Path | None] = None
    """Run folder of a trained model."""
    data: Path | None = None
    """Folder of rows; those that the run learned from, if absent. PingBench queries the test parts of these, but all
    of another folder, as one split."""
    part: str = "val-s1"
    """Of the rows, for a look at one part."""
    queries: int = 0
    """At most. Of a split, 0 = 20,000, or 2,000 with --quick. In a look at one part, measurements, or windows of tokens;
    0 = 50 for destinations, 64 for tokens, 500 for the order of fields, 200 in scripts."""
    seed: int = 0
    """The same seed draws the same queries."""
    device: str = "auto"
    """cpu, cuda or auto."""
    json: Path | None = None
    """File for the numbers that a look at one part, or at hosts, prints."""

    @property
    def trained(self) -> Path:
        """The run; ValueError if there is none."""
        if self.run is None:
            raise ValueError("name the run folder of a trained model")
        return self.run

    @cached_property
    def rows(self) -> Path:
        """The folder of rows that is queried."""
        if self.data is not None:
            return self.data
        from ping_llm.model.checkpoint import load_model

        return Path(load_model(self.trained)[1].data.rows)


@dataclass(frozen=True)
class EvalOptions(PartOptions):
    """Score a model on PingBench beside baselines that learn from the same rows: report.md, results.json, pictures."""

    out: Path | None = None
    """Folder for the results; RUN/eval if absent."""
    quick: FlagCreatePairsOff[bool] = False
    """Fewer queries and smaller trees."""
    baselines_only: FlagCreatePairsOff[bool] = False
    """Score the baselines alone; needs no run."""
    model_only: FlagCreatePairsOff[bool] = False
    """Score the model alone: baselines are added later with --scores, on another machine if need be."""
    scores: tuple[Path, ...] = ()
    """Folders of earlier evaluations of the same queries: the methods that they hold are not computed again."""
    counts: tuple[int, ...] = COUNTS
    """How many earlier measurements are given with a query; each, but 0, in both draws."""
    val_only: FlagCreatePairsOff[bool] = False
    """Leave the test parts alone: to choose among models by val."""
    seq_len: int = 0
    """Tokens that a query and its context must fit in, for all methods; 0 = as many as the model reads."""
    model_queries: int = 0
    """Of each cell, the first so many are put to the model, at most; 0 = all, or 75 with --quick. The report is over the
    queries that all methods answered."""
    src_known: tuple[str, ...] = ("auto", "all", "none")
    """How much of the source the model is given, a method each: auto, all, none, or a prefix length."""
    no_memory: FlagCreatePairsOff[bool] = False
    """Leave the model alone with what it is given. Else it has the run's own rows as memory, from which the baselines learn
    too."""
    truth: Path | None = None
    """The truth.json of a synthetic dump: its true distribution is one more method."""
    train_rows: Path | None = None
    """What the baselines learn from where --data is another folder; the run's own rows if absent."""
    allow_leak: FlagCreatePairsOff[bool] = False
    """Go on although the run may have learned the answers; the report says so."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the model's answers."""
    diagnose: Literal["destinations", "tokens", "order"] | None = None
    """Instead, print how well the model finds the destination given source and RTT, how well it predicts each kind of token,
    or how far the likelihood of a ping depends on the order of its fields."""
    show: int = 1
    """Windows that are printed, colored by how surprising each token was, with --diagnose tokens."""
    live: tuple[str, ...] | None = None
    """Instead, ping these hosts from here, now, and print what the model expected beside what came; each after the pings of
    the hosts before it, as context."""
    src: str = ""
    """The public address of this machine, with --live."""
    count: int = 3
    """Pings of each host, with --live."""

    def check(self) -> None:
        """ValueError says what is missing or wrong."""
        if self.run is None and not self.baselines_only and not self.scores:
            raise ValueError("name the run folder of a trained model, or give --baselines-only")
        if self.baselines_only and self.model_only:
            raise ValueError("--baselines-only and --model-only leave nothing to score; give one of them")
        if self.run is None and (self.data is None or self.out is None):
            raise ValueError("without a run, give --data ROWS and --out DIR")
        for name in ("queries", "model_queries", "seed", "seq_len"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if not self.counts or not set(self.counts) <= set(COUNTS):
            raise ValueError(f"--counts must be some of {', '.join(map(str, COUNTS))}")
        if self.live == ():
            raise ValueError("--live needs hosts to ping, for example --live 193.0.14.129 --src ADDRESS")
        if self.live and not self.src:
            raise ValueError("--live needs --src ADDRESS, the public address of this machine")

    @property
    def folder(self) -> Path:
        """For the results."""
        return self.out or self.trained / "eval"

    @property
    def queries_per_split(self) -> int:
        """At most."""
        return self.queries or (QUICK_QUERIES if self.quick else QUERIES_PER_SPLIT)

    @property
    def model_queries_per_cell(self) -> int:
        """That the model answers, at most."""
        fewer = self.model_queries or (QUICK_MODEL_QUERIES if self.quick else self.queries_per_split)
        return min(self.queries_per_split, fewer)
