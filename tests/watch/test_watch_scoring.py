"""The p-values of a watch are those of `PingModel.score`, each given the context of its result alone."""

import numpy as np
import pytest
import torch
from watching import START_S, lines, result

from ping_llm.config import ModelConfig
from ping_llm.data.measurement import format_address
from ping_llm.inference.calibration import Calibration, Surprise
from ping_llm.inference.files import as_arrow
from ping_llm.inference.model import PingModel
from ping_llm.model.gpt import GPT
from ping_llm.watch.arrivals import parse
from ping_llm.watch.history import ROW, Asked
from ping_llm.watch.scoring import ModelScorer

KNOWN = Calibration(surprise=Surprise(1000, (0.01, 0.5, 1.0), (0.02, 0.4, 1.0)))


def random_model(seq_len: int, calibration: Calibration | None = None) -> PingModel:
    """In double precision, which learned nothing."""
    gpt, generator = GPT(ModelConfig(n_layer=1, n_embd=32, n_head=2, seq_len=seq_len)).double(), torch.Generator()
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.3, generator=generator.manual_seed(parameter.numel()))
    return PingModel(gpt.eval(), torch.device("cpu"), calibration or Calibration(), least_mass=0.0)


def rows(*measured) -> np.ndarray:
    """Of number, last byte of the destination, and RTT."""
    found = [((0,) * 10 + (255, 255, 193, 0, 14, last), START_S + 240 * n, rtt) for n, last, rtt in measured]
    return np.array(found, ROW)


@pytest.fixture
def asked(tmp_path) -> list[Asked]:
    """Two results of two sources: of three packets one of which is lost, and of one."""
    some = result(9, result=[{"rtt": 20.5}, {"x": "*"}, {"rtt": 33.0}]), result(9, probe=2, result=[{"x": "*"}])
    found, _ = parse(lines(*some), tmp_path / "lines")
    pair = rows((1, 129, 20.0), (4, 129, 21.0), (9, 129, 99.0))  # the last is of the same second
    other = rows((2, 7, 5.0), (3, 129, 20.0), (5, 8, -1.0), (8, 9, 40.0))
    return [Asked(found[0], pair, other), Asked(found[1], pair[:1], other[:0])]


def by_score(model, one: Asked, packet: float, src_known: str = "auto") -> float:
    """The p-value of a packet as the last row of a table."""
    table = [(row["dst"].tobytes(), row["time_s"], row["rtt_ms"]) for row in one.context(model.seq_len)]
    table.append((one.result.dst, one.result.time_s, packet))
    scored = model.score(
        [
            {
                "src_addr": format_address(one.result.src),
                "dst_addr": format_address(dst),
                "event_time": int(time_s),
                "rtt": float(rtt),
            }
            for dst, time_s, rtt in table
        ],
        history=20,
        src_known=src_known,
        quiet=True,
    )
    return as_arrow(scored)["p_value"].to_pylist()[-1] if hasattr(scored, "schema") else scored[-1]["p_value"]


@pytest.mark.parametrize("seq_len", [80, 256])
def test_each_packet_has_the_p_value_that_score_gives_it(asked, seq_len):
    model = random_model(seq_len, KNOWN)
    found = ModelScorer(model, "auto").p_values(asked)
    assert [len(own) for own in found] == [3, 1]
    for one, own in zip(asked, found, strict=True):
        assert own == pytest.approx([by_score(model, one, packet) for packet in one.result.rtt_ms], rel=1e-6)
    whole = ModelScorer(model).p_values(asked)
    assert whole[0] == pytest.approx([by_score(model, asked[0], packet, "all") for packet in asked[0].result.rtt_ms])
    assert whole[0] != pytest.approx(found[0], rel=1e-3)
    assert ModelScorer(model).p_values(asked[::-1])[1] == pytest.approx(whole[0], rel=1e-6)
    assert ModelScorer(model).p_values([]) == []


def test_the_context_is_earlier_in_time_order_and_of_other_destinations_as_well(asked):
    context = asked[0].context(256)
    assert context["rtt_ms"].tolist() == [20.0, 5.0, 21.0, -1.0, 40.0]
    assert asked[0].context(80)["rtt_ms"].tolist() == [21.0]


def test_what_was_expected_is_the_distribution_given_all_that_is_kept(asked):
    model = random_model(256)
    found = ModelScorer(model, "all").expected(asked[0])
    context = [
        {"src_addr": "193.0.0.1", "dst_addr": f"193.0.14.{last}", "rtt": rtt, "event_time": START_S + 240 * n}
        for n, last, rtt in [(1, 129, 20.0), (2, 7, 5.0), (4, 129, 21.0), (5, 8, -1.0), (8, 9, 40.0)]
    ]
    rtt = model.rtt("193.0.0.1", "193.0.14.129", START_S + 240 * 9, context, "all")
    assert found["p_fail"] == pytest.approx(rtt.p_fail, abs=1e-4)
    quantiles = [found[name] for name in ("q0.05", "q0.5", "q0.95")]
    assert quantiles == pytest.approx([float(rtt.quantile(q)) for q in (0.05, 0.5, 0.95)], rel=1e-3, abs=6e-4)
