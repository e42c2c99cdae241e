"""What a distribution says of itself to programs and to people: the dictionary, the title of its picture, its refusals."""

import numpy as np
import pytest

from ping_llm.data.tokenization import RTT_CODES, decode_rtt
from ping_llm.inference import distribution as module
from ping_llm.inference.distribution import RTTDistribution


def of_code(code: int, p_fail: float = 0.25, **columns) -> RTTDistribution:
    """All answers within one code."""
    probability = np.zeros(RTT_CODES)
    probability[code] = 1 - p_fail
    return RTTDistribution(probability, p_fail, **columns)


def test_the_dictionary_by_hand():
    columns = {"total_probability": 0.9, "forward_passes": 2, "context_measurements": 7, "unresolved": 0.01}
    answer = of_code(30_000, **columns, src_weights={"all": 0.75, "none": 0.25}).to_dict()
    rtt_ms = pytest.approx(float(decode_rtt(np.array(30_000))), rel=3e-4)
    assert answer == {
        "p_fail": 0.25,
        "median_ms": rtt_ms,
        "mean_ms": rtt_ms,
        "quantiles": dict.fromkeys(("0.05", "0.1", "0.25", "0.5", "0.75", "0.9", "0.95"), rtt_ms),
        "total_probability": 0.9,
        "forward_passes": 2,
        "context_measurements": 7,
        "unresolved_probability": 0.01,
        "src_weights": {"all": 0.75, "none": 0.25},
    }
    assert list(answer["quantiles"].values()) == sorted(answer["quantiles"].values())
    assert answer["quantiles"]["0.05"] < answer["quantiles"]["0.95"]
    never = RTTDistribution(np.zeros(RTT_CODES), 1.0).to_dict()
    assert never["median_ms"] is never["mean_ms"] is None and set(never["quantiles"].values()) == {None}


def test_a_picture_is_drawn_with_its_title_and_the_truth(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(module, "plot_rtt", lambda *given: drawn.append(given))
    one, truth = of_code(30_000), of_code(30_001)
    one.plot(str(tmp_path / "rtt.png"), "a → b", truth)
    one.plot(tmp_path / "rtt.png")
    assert drawn == [
        ({"model": one}, tmp_path / "rtt.png", title, known) for title, known in (("a → b", truth), ("", None))
    ]


def test_refusals_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"^no distributions to put together$"):
        RTTDistribution.concatenate([])
    for name, score in (("CRPS", of_code(30_000).crps), ("PIT", of_code(30_000).pit)):
        with pytest.raises(
            ValueError, match=rf"^the {name} is of an answered ping, and this one failed; log_density scores"
        ):
            score(-1)
    with pytest.raises(TypeError, match=r"^the distribution of one ping has no length$"):
        len(of_code(1))
    with pytest.raises(TypeError, match=r"^the distribution of one ping has no parts$"):
        of_code(1)[0]
