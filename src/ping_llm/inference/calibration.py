"""Answers of a model on val in, how to weigh and judge its other answers out; kept as a small file of the run folder."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm.inference.experts import Experts
from ping_llm.inference.familiar import Familiar
from ping_llm.inference.query import Endpoint, known_name
from ping_llm.system.files import write_atomically

CALIBRATION_NAME = "calibration.json"
LEAST_SHARE = 0.001  # of every known length: a context may still speak for it
TAIL_RESULTS, TAIL_SHARE = 40, 0.1  # of the p-values of val so many, at most such a share: their tail is fitted
_RIGHT = 20  # results that a right model would have, added to those of val, so that few say little
_KNOTS = 60  # of the distribution function above the tail
_SCALE_SPREAD, _SHAPE_SPREAD = 1.5, 0.3  # how far from 1 (in logs) and from 0 the tail is expected to be
_SCALES = np.exp(np.linspace(-4, 5, 361))
_SHAPES = np.linspace(-0.5, 1.0, 76)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surprise:
    """How the model's own p-values of the results of val are distributed; those of a right model are uniform.

    Above the tail their distribution function counts. In the tail, which a few results say little of, the excess of −log p
    over its threshold follows a generalised Pareto distribution (Pickands, Annals of Statistics 1975; for thresholds of
    anomalies Siffer et al., KDD 2017), of scale 1 and shape 0 for a right model. The fit is expected to be near that (a
    penalised likelihood, as Coles and Dixon, Extremes 1999).
    """

    count: int = 0  # results of val
    shares: tuple[float, ...] = ()  # from that of the tail to 1
    quantiles: tuple[float, ...] = ()  # of the p-values at these shares
    scale: float = 1.0
    shape: float = 0.0

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Surprise:
        """What `dataclasses.asdict` made of one; a TypeError or KeyError if it is damaged."""
        return cls(
            values["count"], tuple(values["shares"]), tuple(values["quantiles"]), values["scale"], values["shape"]
        )

    @classmethod
    def fit(cls, own: np.ndarray) -> Surprise:
        """To the own p-values of the results of val, (n,); none make p-values stay as they are."""
        if not len(own):
            return cls()
        shares = np.geomspace(min(TAIL_RESULTS / len(own), TAIL_SHARE), 1, _KNOTS)
        quantiles = np.maximum(np.quantile(own, shares, method="hazen"), np.finfo(float).tiny)
        excess = np.log(quantiles[0]) - np.log(np.maximum(own[own < quantiles[0]], np.finfo(float).tiny))
        return cls(len(own), tuple(shares.tolist()), tuple(quantiles.tolist()), *_fit_tail(excess))

    def calibrated(self, own: np.ndarray) -> np.ndarray:
        """The share of results of val, and of a few of a right model, at least as surprising as those with these own
        p-values, (m,)."""
        if not self.count:
            return own
        excess = np.log(self.quantiles[0]) - np.log(np.maximum(own, np.finfo(float).tiny))
        tail = self.shares[0] * np.exp(_log_tail(np.maximum(excess, 0.0), self.scale, self.shape))
        of_val = np.where(excess > 0, tail, np.interp(own, self.quantiles, self.shares))
        return (self.count * of_val + _RIGHT * own) / (self.count + _RIGHT)


@dataclass(frozen=True)
class Calibration:
    """Fitted on val; without it, queries without context are answered with all of the source known.

    `src_weights[family][known]` is the share in which the answers under each known length of the source, without context,
    are best mixed; family is ipv4 or ipv6, known is none, a prefix length like /16, or all. `new_src_weights` are those of
    sources that training has not met, as `familiar` says. `experts` are the rules of what answers beside the model.
    `surprise` is what the model's own p-values of the results of val were. `model_sha256` is the hash of the weights that
    all of it was fitted for; those written before had none.
    """

    src_weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    new_src_weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    familiar: Familiar | None = None
    experts: Experts | None = None
    surprise: Surprise = field(default_factory=Surprise)
    model_sha256: str | None = None

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """That of a run folder, or of the one above a checkpoint; an empty one where none was written."""
        file = _file(path)
        if file is None:
            return cls()
        try:
            values = json.loads(file.read_text())
            familiar, experts, surprise = (values.get(name) for name in ("met", "experts", "p_values"))
            return cls(  # those written before have less, or other p-values
                values["src_weights"],
                values.get("new_src_weights", {}),
                None if familiar is None else Familiar.of_json(familiar),
                None if experts is None else Experts.of_json(experts),
                Surprise() if surprise is None else Surprise.of_json(surprise),
                values.get("model_sha256"),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file} is damaged; delete it to answer without") from None

    @classmethod
    def load_for(cls, path: Path, model_sha256: str) -> Calibration:
        """The one of a run folder or checkpoint if it was fitted for these weights; else an empty one, with a warning."""
        found, file = cls.load(path), _file(path)
        # Before calibrations knew their weights, they were those of the checkpoint that the run folder stands for.
        if file is None or found.model_sha256 == model_sha256 or (not found.model_sha256 and file.parent == Path(path)):
            return found
        log.warning(
            "%s was fitted for another checkpoint than that of %s, which answers without it: prefix lengths are not weighed "
            "and p-values not calibrated; name the run folder, or train on to fit it anew",
            file,
            path,
        )
        return cls()

    def save(self, run_dir: Path) -> None:
        """Writes calibration.json."""
        values: dict[str, Any] = {"model_sha256": self.model_sha256, "src_weights": self.src_weights}
        values |= {"new_src_weights": self.new_src_weights, "p_values": dataclasses.asdict(self.surprise)}
        values |= {} if self.experts is None else {"experts": self.experts.to_json()}
        values |= {} if self.familiar is None else {"met": self.familiar.to_json()}
        write_atomically(run_dir / CALIBRATION_NAME, json.dumps(values, indent=1) + "\n")

    def is_new(self, src: Endpoint) -> bool:
        """Whether training has not met a whole source; False where it is not known what it has met."""
        if self.familiar is None or src.is_prefix:
            return False
        return self.familiar.known_bytes_of("src", src.packed) < src.width

    def log_weights(self, known: Sequence[Endpoint]) -> np.ndarray:
        """Logarithm of the weight of each known length of one source before any context is read, (L,).

        The shortest comes first; the longest stands for all that are longer too. Where val was asked, a length that it gave
        no share has none: −∞.
        """
        of_new = self.new_src_weights.get(known[0].family, {}) if self.is_new(known[-1]) else {}
        weights = of_new or self.src_weights.get(known[0].family, {})
        shares = np.array([weights.get(known_name(src), 0.0) for src in known])
        shares[-1] = max(1 - shares[:-1].sum(), 0.0)
        with np.errstate(divide="ignore"):
            return np.log(shares if weights and shares.any() else np.maximum(shares, LEAST_SHARE))


def _file(path: Path) -> Path | None:
    files = (folder / CALIBRATION_NAME for folder in (Path(path), Path(path).resolve().parent.parent))
    return next((file for file in files if file.exists()), None)


def _log_tail(excess: np.ndarray, scale: float | np.ndarray, shape: float | np.ndarray) -> np.ndarray:
    """log P(more than this excess) under a generalised Pareto distribution."""
    shape = np.where(np.abs(shape) < 1e-9, 1e-9, shape)
    with np.errstate(divide="ignore"):
        return -np.log(np.maximum(1 + shape * excess / scale, 0.0)) / shape


def _fit_tail(excess: np.ndarray) -> tuple[float, float]:
    """The likeliest scale and shape of excesses, (k,), given what is expected of them."""
    best = (-np.inf, 1.0, 0.0)
    for shape in _SHAPES:
        of_shape = np.where(np.abs(shape) < 1e-9, 1e-9, shape)
        with np.errstate(divide="ignore"):
            ratio = np.log(np.maximum(1 + of_shape * excess / _SCALES[:, None], 0.0)).sum(axis=1)  # (scales,)
        likelihood = -len(excess) * np.log(_SCALES) - (1 + 1 / of_shape) * ratio
        penalty = (np.log(_SCALES) / _SCALE_SPREAD) ** 2 / 2 + (shape / _SHAPE_SPREAD) ** 2 / 2
        value = np.where(np.isfinite(likelihood), likelihood - penalty, -np.inf)
        best = max(best, (float(value.max()), float(_SCALES[value.argmax()]), float(shape)))
    return best[1], best[2]
