"""Answers of a model on val in, how to weigh and judge its other answers out; kept as a small file of the run folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ping_llm.inference.query import Endpoint, known_name
from ping_llm.system.files import write_atomically

CALIBRATION_NAME = "calibration.json"
LEAST_SHARE = 0.001  # of every known length: a context may still speak for it


@dataclass(frozen=True)
class Calibration:
    """Fitted on val; without it, queries without context are answered with all of the source known.

    `src_weights[family][known]` is the share in which the answers under each known length of the source, without context,
    are best mixed; family is ipv4 or ipv6, known is none, a prefix length like /16, or all. `surprise` holds ascending
    values of the model's own p-value of the results of val: those of a right model are uniform. All sources of val are in
    the training data too, so these shares do not hold for new sources. `familiar[family]` recognises those: it is the
    log P(address of the source) that 95 % of the results of val exceed.
    """

    src_weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    surprise: tuple[float, ...] = ()
    familiar: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """That of a run folder, or of the one above a checkpoint; an empty one where none was written."""
        for folder in (path, path.parent.parent):
            file = folder / CALIBRATION_NAME
            if file.exists():
                try:
                    values = json.loads(file.read_text())
                    return cls(values["src_weights"], tuple(values["surprise"]), values["familiar"])
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"{file} is damaged; delete it to answer without") from None
        return cls()

    def save(self, run_dir: Path) -> None:
        """Writes calibration.json."""
        values = {"src_weights": self.src_weights, "surprise": list(self.surprise), "familiar": self.familiar}
        write_atomically(run_dir / CALIBRATION_NAME, json.dumps(values, indent=1) + "\n")

    def novelty(self, src: Endpoint, log_p: float) -> float:
        """How likely a whole source is one that training has not shown, from log P(its address) under the model."""
        familiar = self.familiar.get(src.family)
        return 0.0 if familiar is None else 1 / (1 + math.exp(min(log_p - familiar, 700.0)))

    def log_weights(self, known: Sequence[Endpoint], novelty: float = 0.0) -> np.ndarray:
        """Logarithm of the weight of each known length of one source before any context is read, (L,).

        The shortest comes first; the longest stands for all that are longer too. Of a novel source the shortest counts: what
        a model says of an address that it never saw is worse than what it says of any source.
        """
        weights = self.src_weights.get(known[0].family, {})
        shares = np.array([weights.get(known_name(src), 0.0) for src in known])
        shares[-1] = max(1 - shares[:-1].sum(), 0.0)
        shares *= 1 - novelty
        shares[0] += novelty
        return np.log(np.maximum(shares, LEAST_SHARE))
