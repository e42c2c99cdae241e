"""The sixteen predictors that a model is compared with: they see the same rows, and choose everything on val."""

from __future__ import annotations

from ping_llm.eval.baselines.base import Baseline, PointBaseline
from ping_llm.eval.baselines.coordinates import VIVALDI_2D, VIVALDI_8D
from ping_llm.eval.baselines.factors import DMFSGD_METHOD, LOG_FACTORS
from ping_llm.eval.baselines.history import EMA_FAST, EMA_SLOW, LAST_SEEN, ROLLING_MEDIAN, PairHistory
from ping_llm.eval.baselines.neighbours import PREFIX_KNN, PROFILE_KNN
from ping_llm.eval.baselines.simple import ADDITIVE, DESTINATION_MEDIAN, GLOBAL_MEDIAN, SOURCE_MEDIAN
from ping_llm.eval.baselines.stack import Stack
from ping_llm.eval.baselines.trees import LightGBM, TreeSettings


def all_baselines(trees: TreeSettings | None = None) -> list[Baseline]:
    """New ones, not fitted, in the order in which they build on each other; the stack shares its members.

    Fit all of them on the same objects, and let all predict the same view object: what they share is made once.
    """
    simple = (GLOBAL_MEDIAN, SOURCE_MEDIAN, DESTINATION_MEDIAN, ADDITIVE, LAST_SEEN, EMA_FAST, EMA_SLOW, ROLLING_MEDIAN)
    learned = (VIVALDI_2D, VIVALDI_8D, DMFSGD_METHOD, LOG_FACTORS, PROFILE_KNN, PREFIX_KNN)
    points = {method: PointBaseline(method) for method in (*simple, *learned)}
    pair_history, lightgbm = PairHistory(), LightGBM(trees)
    members = [*(points[one] for one in simple), pair_history, *(points[one] for one in learned), lightgbm]
    return [*members, Stack(members)]
