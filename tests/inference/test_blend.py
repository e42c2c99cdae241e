"""Under auto an answer is the model's, mixed with those of the experts; the model may be given less of a new destination."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import write_rows
from random_model import random_model
from test_past import DST, HOUR, SRC, T, query, row_of

from ping_llm.inference.blend import situations
from ping_llm.inference.calibration import Calibration
from ping_llm.inference.context import Context
from ping_llm.inference.distribution import RTTDistribution
from ping_llm.inference.experts import Expert, Experts
from ping_llm.inference.familiar import Familiar
from ping_llm.inference.memory import Memory
from ping_llm.inference.packed import Foreseen, Windows, foresee
from ping_llm.inference.past import pasts
from ping_llm.inference.query import Endpoint, Query

EXPERT = Expert((-1.5, 0.1), (0.01, 0.1), ((0.0,) * 4, (0.3, 0.0, 0.0, 0.0)))
NEVER = (-50.0, 0.0, 0.0, 0.0)
PAIR = (0.7, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0)
OTHERS = (0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def rows():
    other = row_of("203.0.113.77", [(DST, 1, 30.0), ("203.0.113.1", 1, 21.0)], 2)
    return [row_of(SRC, [(DST, 1, 10.0), (DST, 2, 11.0), ("203.0.113.1", 1, 20.0)], 1), other]


@pytest.fixture(scope="module")
def memory(rows, tmp_path_factory):
    return Memory.open(write_rows(tmp_path_factory.mktemp("rows"), {"train": rows}, shards=1))


def model_of(rows, memory=None, cuts=(NEVER, NEVER), kinds=("pair", "others")):
    odds = {kind: value for kind, value in (("pair", PAIR), ("others", OTHERS)) if kind in kinds}
    experts = Experts(dict.fromkeys(kinds, EXPERT), cuts, odds)
    calibration = Calibration({"ipv4": {"/16": 0.3, "all": 0.7}}, familiar=Familiar.of_rows(rows), experts=experts)
    model = random_model(16, 128, True, calibration)
    return dataclasses.replace(model, memory=memory)


def test_an_answer_is_the_model_s_and_that_of_each_expert_by_its_weight(rows, memory):
    model = model_of(rows, memory)
    plain = dataclasses.replace(model, calibration=dataclasses.replace(model.calibration, experts=None))
    for one in (query(5), query(5, [(DST, 3, 12.0), ("203.0.113.9", 4, 1.0)]), query(5, src="192.0.2.77")):
        (found,), (of_model,) = (list(some.distributions([one])) for some in (model, plain))
        past = pasts([one], memory)
        logits = {"model": 0.0}
        for kind, odds in (("pair", PAIR), ("others", OTHERS)):
            if past[kind].count[0]:
                logits[kind] = odds[0] + odds[1] * np.log(past[kind].count[0])
        total = sum(np.exp(list(logits.values())))
        expected = of_model.code_probability * np.exp(0) / total
        for kind in logits.keys() - {"model"}:
            expected = expected + np.exp(logits[kind]) / total * of_model.p_answer * EXPERT.code_probability(past[kind])
        np.testing.assert_allclose(found.code_probability, expected, atol=1e-7)
        np.testing.assert_array_equal(found.p_fail, of_model.p_fail)
        assert found.unresolved == pytest.approx(of_model.unresolved / total)
    assert len(logits) == 2  # of a source without a past there are only the others


def test_only_auto_is_blended_and_several_are_answered_alike_from_one_set_of_passes(rows, memory):
    from ping_llm.inference.mixture import distributions_under

    model, asked = model_of(rows, memory), [query(5), query(4, [(DST, 2, 11.0)]), query(5, src="192.0.2.77")]
    plain = dataclasses.replace(model, calibration=dataclasses.replace(model.calibration, experts=None))
    (together,) = distributions_under(model, asked, ["all", "auto", "none"])
    for known, found in zip(("all", "auto", "none"), together, strict=True):
        (alone,) = model.distributions(asked, known)
        np.testing.assert_allclose(found.code_probability, alone.code_probability, atol=1e-6)
        (of_plain,) = plain.distributions(asked, known)
        same = np.allclose(found.code_probability, of_plain.code_probability, atol=1e-6)
        assert same == (known != "auto")


def test_the_model_is_given_less_of_a_new_destination_as_far_as_that_counts(rows):
    half = (0.0, 0.0, 0.0, 0.0)
    model = model_of(rows, cuts=(half, (np.log(2), 0.0, 0.0, 0.0)), kinds=())
    new = query(5, dst="198.51.7.9")  # of which train has met 198.51
    (found,) = model.distributions([new, query(5)])
    plain = dataclasses.replace(model, calibration=dataclasses.replace(model.calibration, experts=None))
    cut = [dataclasses.replace(new, dst=new.dst.cut(n)) for n in (4, 2, 1)]
    whole, prefix, byte = (next(plain.distributions([one])) for one in cut)
    expected = (whole.code_probability + prefix.code_probability + 2 * byte.code_probability) / 4
    np.testing.assert_allclose(found.code_probability[:1], expected, atol=1e-6)
    (met,) = plain.distributions([query(5)])
    np.testing.assert_allclose(found.code_probability[1:], met.code_probability, atol=1e-6)
    assert sum(found.src_weights[0].values()) == pytest.approx(1)


def test_situations_say_which_ends_are_new_and_how_a_destination_can_be_cut(rows):
    part = Query.of(Endpoint.parse(SRC), Endpoint.parse("198.51.7.0/24"), T)
    asked = [
        query(5),
        query(5, [(DST, 3, 1.0)] * 3, dst="198.51.7.9"),
        query(5, src="192.0.2.77", dst="8.8.8.8"),
        part,
        Query.of(Endpoint.parse("2001:db8::1"), None, None),
    ]
    situation, cuts = situations(Familiar.of_rows(rows), asked)
    assert situation.tolist() == [[0, 0, 0], [0, 1, np.log(4)], [1, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert cuts.tolist() == [[0, 0], [2, 1], [1, 0], [0, 0], [0, 0]]
    nothing = situations(None, asked)
    assert not nothing[0][:, :2].any() and not nothing[1].any()


@pytest.mark.parametrize("remembers", [False, True])
def test_a_window_answers_as_a_prompt_for_each_measurement(rows, memory, remembers):
    model = model_of(rows, memory if remembers else None)
    rng = np.random.default_rng(3)
    lines = [
        {
            "src_addr": str(rng.choice([SRC, "192.0.2.77"])),
            "dst_addr": str(rng.choice([DST, "203.0.113.1"])),
            "rtt": -1.0 if rng.random() < 0.2 else float(rng.lognormal(3)),
            "event_time": T + HOUR * (3 + i),
        }
        for i in range(24)
    ]
    windows = Windows(Context.parse(lines), 4, 128)
    order, found = foresee(model, windows)
    batches = RTTDistribution.concatenate(list(model.distributions(windows.queries(order))))
    alone = Foreseen.of_distributions(batches, windows.measured.rtt_ms[order])
    for name in ("p_fail", "faster", "same", "slower"):
        np.testing.assert_allclose(getattr(found, name), getattr(alone, name), atol=1e-4, err_msg=name)
    with torch.no_grad():
        plain = dataclasses.replace(model, calibration=dataclasses.replace(model.calibration, experts=None))
        assert np.nanmax(np.abs(foresee(plain, windows)[1].faster - found.faster)) > 0.05
