"""Claims about the loss per field."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm.config import FIELDS, LossConfig
from ping_llm.data import tokenization as tk
from ping_llm.model.loss import (
    PARTS,
    count_results,
    field_losses,
    field_weights,
    part_masks,
    smoothing_cost,
    token_fields,
)

STRUCTURE, SRC, DST, TIME, RTT, RTT1, RTT2 = range(7)
ROLE_FIELDS = torch.tensor(tk.FIELD_OF_ROLE)
BYTE_FIELDS = torch.tensor(tk.FIELD_OF_BYTES_AFTER)
WEIGHTS = LossConfig(src=2.0, dst=3.0, time=4.0, rtt=5.0, structure=6.0)


def fields_of(tokens: list[list[int]]) -> list[list[int]]:
    return token_fields(torch.tensor(tokens), ROLE_FIELDS, BYTE_FIELDS).tolist()


def window_of_results(*codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets and fields (1, 16) of a window: FAILED, the codes of a result, of a muted and of another one, and of one that
    is cut after byte 1."""
    read = [0, 10]
    for code in [*codes, 0x1234, 0x5678, 0x9ABC, 0xDEF0][:4]:
        read += [0, 8, *(tk.BYTE_0 + byte for byte in divmod(code, 256))]
    tokens = torch.tensor([read[:-1]])
    targets = tokens[:, 1:].clone()
    targets[:, 7:9] = -1
    return targets, token_fields(tokens, ROLE_FIELDS, BYTE_FIELDS)[:, 1:]


def test_fields_of_a_window_by_hand():
    #        start src ×2 bytes, dst ×1 byte, rtt ×2 bytes, start, failed, time1 ×1 byte, padding
    window = [0, 1, 20, 266, 4, 11, 8, 12, 13, 0, 10, 6, 99, -1]
    expected = [0, 0, SRC, SRC, 0, DST, 0, RTT, RTT, 0, RTT, 0, TIME]
    assert fields_of([window])[0][:-1] == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-1, 266), min_size=1, max_size=40))
def test_fields_agree_with_a_loop(tokens):
    role, expected = None, []
    for token in tokens:
        if 0 <= token < 11:
            role = token
            expected.append(ROLE_FIELDS[token].item())
        else:
            expected.append(STRUCTURE if role is None else BYTE_FIELDS[role].item())
    assert fields_of([tokens])[0] == expected


def test_sums_and_counts_agree_with_one_cross_entropy_a_field():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, 267, generator=generator)
    targets = torch.randint(-1, 267, (3, 50), generator=generator)
    targets[:, 40:] = -1
    fields = torch.randint(5, (3, 50), generator=generator, dtype=torch.uint8)
    sums, counts = field_losses(logits, targets, fields)
    masks = part_masks(targets, fields)
    for number in range(len(PARTS)):
        chosen = (fields == number) & (targets >= 0) if number < len(FIELDS) else masks[number]
        assert counts[number] == chosen.sum()
        expected = F.cross_entropy(logits[chosen], targets[chosen], reduction="sum")
        torch.testing.assert_close(sums[number], expected, rtol=1e-5, atol=1e-4)
    assert sums.dtype == torch.float32 and counts[: len(FIELDS)].sum() == (targets >= 0).sum()
    assert counts[RTT1] > 0 and counts[RTT2] > 0


# What training adds because values are ordered


def normal_masses(code: int, deviation: float) -> np.ndarray:
    """A normal around a code, cut into the 65,536 codes and normalised, float64: one code at a time."""
    edges = [math.erf((edge - 0.5 - code) / deviation / math.sqrt(2)) / 2 for edge in range(tk.RTT_CODES + 1)]
    masses = np.diff(np.array(edges))
    return masses / masses.sum()


def byte_targets(code: int, deviation: float) -> tuple[np.ndarray, np.ndarray]:
    """The marginal of byte 1 and the conditional of byte 2 after the true byte 1, (256,) each."""
    masses = normal_masses(code, deviation).reshape(256, 256)
    return masses.sum(axis=1), masses[code // 256] / masses[code // 256].sum()


def trained_cost(logits: torch.Tensor, targets: torch.Tensor, fields: torch.Tensor, deviation: float) -> torch.Tensor:
    """What training makes small, for weights of 1."""
    costs = field_losses(logits, targets, fields)[0][: len(FIELDS)]
    return costs.sum() + smoothing_cost(logits, targets, fields, deviation)


def random_logits(T: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, T, 267, generator=torch.Generator().manual_seed(seed)).mul(3).requires_grad_()


def test_a_smoothed_code_by_hand():
    """A deviation of one code: 38.3 % of a normal lie within half a deviation of its middle, 24.2 % in the next code."""
    _, byte2 = byte_targets(0x1280, 1.0)
    assert byte2[0x7E:0x83] == pytest.approx([0.0606, 0.2417, 0.3829, 0.2417, 0.0606], abs=1e-4)
    byte1, byte2 = byte_targets(0x12FF, 1.0)  # the upper half of what is not the code itself is in the next byte 1
    assert byte1[0x12:0x14] == pytest.approx([0.6915, 0.3085], abs=1e-4)
    assert byte2[0xFD:] == pytest.approx([0.0606 / 0.6915, 0.2417 / 0.6915, 0.3829 / 0.6915], abs=1e-4)
    byte1, _ = byte_targets(0x0000, 1.0)  # no code is below the first
    assert byte1[0] == pytest.approx(1)


@pytest.mark.parametrize("deviation", [0.3, 3.0, 40.0, 3000.0])
@pytest.mark.parametrize("code", [0x1280, 0x12FF, 0x1300, 0x0000, 0xFFFF, 0x00FF, 0xFF01])
def test_the_gradient_of_smoothed_targets_is_foretold_minus_wanted(code, deviation):
    targets, fields = window_of_results(code)
    logits = random_logits(16)
    trained_cost(logits, targets, fields, deviation).backward()
    foretold = logits.detach().softmax(-1)[0]
    for place, wanted in zip((3, 4), byte_targets(code, deviation), strict=True):
        expected = foretold[place].clone()
        expected[tk.BYTE_0 :] -= torch.tensor(wanted, dtype=torch.float32)
        torch.testing.assert_close(logits.grad[0, place], expected, rtol=0, atol=3e-6)
    expected = foretold[0] - F.one_hot(torch.tensor(10), 267)  # FAILED
    torch.testing.assert_close(logits.grad[0, 0], expected, rtol=0, atol=1e-6)
    assert logits.grad[0, 7:9].abs().max() == 0  # muted


def test_smoothed_costs_are_the_mean_cross_entropy_over_the_targets():
    logits, (targets, fields) = random_logits(16).detach(), window_of_results(0x34F8)
    targets[0, 5:] = -1
    log_p = logits.log_softmax(-1)[0]
    expected = sum(
        -(torch.tensor(wanted) * log_p[place, tk.BYTE_0 :]).sum().item()
        for wanted, place in zip(byte_targets(0x34F8, 5.0), (3, 4), strict=True)
    )
    cost = field_losses(logits, targets, fields)[0][RTT1:].sum() + smoothing_cost(logits, targets, fields, 5.0)
    assert cost.item() == pytest.approx(expected, rel=1e-5)


def test_a_byte_1_whose_byte_2_the_window_cuts_off_stands_in_the_middle_of_its_step():
    targets, fields = window_of_results()
    logits = random_logits(16)
    trained_cost(logits, targets, fields, 100.0).backward()
    edges = torch.tensor([-384.0, -128, 128, 384]) / 100
    expected = torch.special.ndtr(edges).diff()  # of values 0xDD, 0xDE and 0xDF
    wanted = logits.detach().softmax(-1)[0, 15] - logits.grad[0, 15]
    torch.testing.assert_close(wanted[tk.BYTE_0 + 0xDD : tk.BYTE_0 + 0xE0], expected, rtol=0, atol=2e-4)


def test_a_tiny_deviation_is_no_smoothing():
    targets, fields = window_of_results()
    assert smoothing_cost(random_logits(16), targets, fields, 1e-3).abs() < 1e-4


def test_the_compiled_cost_and_that_of_bf16_logits_are_that_of_fp32():
    torch._dynamo.reset()
    targets, fields = window_of_results()
    logits = random_logits(16).detach().bfloat16()
    expected = smoothing_cost(logits.float(), targets, fields, 3.0)
    assert torch.equal(smoothing_cost(logits, targets, fields, 3.0), expected)
    compiled = torch.compile(smoothing_cost, backend="aot_eager", fullgraph=True)
    gradients = []
    for function in (smoothing_cost, compiled):
        given = logits.float().requires_grad_()
        cost = function(given, targets, fields, 3.0)
        torch.testing.assert_close(cost.detach(), expected, rtol=1e-5, atol=1e-5)
        cost.backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_ignored_targets_get_no_gradient():
    logits = torch.zeros(1, 3, 267, requires_grad=True)
    sums, _ = field_losses(logits, torch.tensor([[5, -1, 7]]), torch.zeros(1, 3, dtype=torch.uint8))
    sums.sum().backward()
    assert logits.grad[0, 1].abs().max() == 0 and logits.grad[0, 0].abs().max() > 0.9


def test_weights_stand_in_the_order_of_the_fields():
    weights = dict(zip(PARTS, field_weights(WEIGHTS).tolist(), strict=True))
    assert weights == {"structure": 6, "src": 2, "dst": 3, "time": 4, "rtt": 5, "rtt1": 0, "rtt2": 0}


def test_the_bytes_of_results_by_hand():
    """FAILED is no byte, a muted result has no targets, and a window may end between both bytes."""
    targets, fields = window_of_results()
    masks = part_masks(targets, fields)
    assert masks[RTT, 0].nonzero().ravel().tolist() == [0, 3, 4, 11, 12, 15]
    assert masks[RTT1, 0].nonzero().ravel().tolist() == [3, 11, 15]
    assert masks[RTT2, 0].nonzero().ravel().tolist() == [4, 12]


def test_results_are_counted_once_each():
    tokens = torch.tensor([[0, 8, 12, 13, 0, 10, 0, 8, 12, 13], [0, 10, -1, -1, -1, -1, -1, -1, -1, -1]])
    fields = token_fields(tokens, ROLE_FIELDS, BYTE_FIELDS)
    assert count_results(tokens, fields) == 4


def test_the_fields_of_an_encoded_window_are_those_of_what_was_encoded():
    """Two measurements: of an IPv4 pair, answered, with an absolute time; and of an IPv6 pair, failed, a minute later."""
    fields = tk.Fields(
        src=np.array([[*[0] * 10, 255, 255, 192, 0, 2, 1], [0x20, 1, 0xD, 0xB8, *[0] * 11, 1]], dtype=np.uint8),
        dst=np.array([[*[0] * 10, 255, 255, 198, 51, 100, 1], [0x20, 1, 0xD, 0xB8, *[0] * 11, 2]], dtype=np.uint8),
        src_bytes=np.array([4, 16]),
        dst_bytes=np.array([4, 16]),
        rtt_ms=np.array([12.5, -1.0]),
        time_s=np.array([1_700_000_000, 1_700_000_060]),
        timed=np.array([True, True]),
        order=np.array([[0, 1, 2, 3]] * 2, dtype=np.float32),
        window=np.zeros(2, dtype=np.int64),
    )
    tokens = tk.encode(fields)[0]
    first = [0, 0, *[SRC] * 4, 0, *[DST] * 4, 0, RTT, RTT, 0, *[TIME] * 8]
    second = [0, 0, *[SRC] * 16, 0, *[DST] * 16, RTT, 0, TIME]
    assert fields_of([tokens.tolist()])[0] == first + second


def test_a_start_of_a_measurement_is_a_target_and_padding_is_none():
    masks = part_masks(torch.tensor([[0, 1, -1]]), torch.tensor([[STRUCTURE, STRUCTURE, STRUCTURE]]))
    assert masks[:, 0].tolist() == [[True, True, False], *[[False] * 3] * 6]


def test_everything_stays_on_the_device_of_the_tokens_and_in_a_byte_each():
    """Tensors of the device "meta" have a shape and no values, and no operation takes them together with others."""
    tokens, role_fields, byte_fields = (
        each.to("meta") for each in (torch.zeros(2, 9).long(), ROLE_FIELDS, BYTE_FIELDS)
    )
    fields = token_fields(tokens, role_fields, byte_fields)
    sums, counts = field_losses(torch.empty(2, 9, 267, device="meta"), tokens, fields)
    assert fields.dtype == torch.uint8 and fields.shape == (2, 9)
    added = smoothing_cost(torch.empty(2, 9, 267, device="meta"), tokens, fields, 3.0)
    assert {each.device.type for each in (fields, sums, counts, added, count_results(tokens, fields))} == {"meta"}
