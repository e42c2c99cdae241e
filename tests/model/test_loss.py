"""Claims about the loss per field."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ping_llm.config import FIELDS, LossConfig
from ping_llm.model.loss import count_results, field_losses, field_weights, token_fields

STRUCTURE, SRC, DST, TIME, RTT = range(5)
ROLE_FIELDS = torch.tensor([STRUCTURE] * 10 + [RTT])
BYTE_FIELDS = torch.tensor([STRUCTURE, SRC, SRC, DST, DST, TIME, TIME, TIME, RTT, STRUCTURE, STRUCTURE])


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


def test_the_vocabulary_lists_the_same_fields():
    tokenization = pytest.importorskip("ping_llm.data.tokenization")
    np.testing.assert_array_equal(tokenization.FIELD_OF_ROLE, ROLE_FIELDS.numpy())
    np.testing.assert_array_equal(tokenization.FIELD_OF_BYTES_AFTER, BYTE_FIELDS.numpy())
