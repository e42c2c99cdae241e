"""Claims about the loss per field."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm.config import FIELDS, LossConfig
from ping_llm.data import tokenization as tk
from ping_llm.model.loss import count_results, field_losses, field_masks, field_weights, token_fields

STRUCTURE, SRC, DST, TIME, RTT = range(5)
ROLE_FIELDS = torch.tensor(tk.FIELD_OF_ROLE)
BYTE_FIELDS = torch.tensor(tk.FIELD_OF_BYTES_AFTER)


def fields_of(tokens: list[list[int]]) -> list[list[int]]:
    return token_fields(torch.tensor(tokens), ROLE_FIELDS, BYTE_FIELDS).tolist()


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
    for number in range(len(FIELDS)):
        chosen = (fields == number) & (targets >= 0)
        assert counts[number] == chosen.sum()
        expected = F.cross_entropy(logits[chosen], targets[chosen], reduction="sum")
        torch.testing.assert_close(sums[number], expected, rtol=1e-5, atol=1e-4)
    assert sums.dtype == torch.float32 and counts.sum() == (targets >= 0).sum()


def test_ignored_targets_get_no_gradient():
    logits = torch.zeros(1, 3, 267, requires_grad=True)
    sums, _ = field_losses(logits, torch.tensor([[5, -1, 7]]), torch.zeros(1, 3, dtype=torch.uint8))
    sums.sum().backward()
    assert logits.grad[0, 1].abs().max() == 0 and logits.grad[0, 0].abs().max() > 0.9


def test_weights_stand_in_the_order_of_the_fields():
    weights = field_weights(LossConfig(src=2.0, dst=3.0, time=4.0, rtt=5.0, structure=6.0))
    assert dict(zip(FIELDS, weights.tolist(), strict=True)) == {"structure": 6, "src": 2, "dst": 3, "time": 4, "rtt": 5}


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
    masks = field_masks(torch.tensor([[0, 1, -1]]), torch.tensor([[STRUCTURE, STRUCTURE, STRUCTURE]]))
    assert masks[:, 0].tolist() == [[True, True, False], *[[False] * 3] * 4]


def test_everything_stays_on_the_device_of_the_tokens_and_in_a_byte_each():
    """Tensors of the device "meta" have a shape and no values, and no operation takes them together with others."""
    tokens, role_fields, byte_fields = (
        each.to("meta") for each in (torch.zeros(2, 9).long(), ROLE_FIELDS, BYTE_FIELDS)
    )
    fields = token_fields(tokens, role_fields, byte_fields)
    sums, counts = field_losses(torch.empty(2, 9, 267, device="meta"), tokens, fields)
    assert fields.dtype == torch.uint8 and fields.shape == (2, 9)
    assert {each.device.type for each in (fields, sums, counts, count_results(tokens, fields))} == {"meta"}
