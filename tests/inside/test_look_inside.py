"""What is seen within a model is what it computes: its own attention, its own residual stream, and nothing is changed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lookable import lookable

from ping_llm.data import tokenization as tk
from ping_llm.inside import hooks
from ping_llm.inside.hooks import attention_weights, look_inside
from ping_llm.model.fields import read_fields
from ping_llm.model.gpt import GPT

WINDOW = np.array(
    [tk.MEASUREMENT_START, tk.DST_IPV4, *range(20, 24), tk.SRC_IPV4, *range(30, 34), tk.RTT_START, 90, 17]
)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MASK = some(1, 1, 5, 7, seed=3) > -0.5
MASK[..., 0] = True  # a row that sees nothing has no weights


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.7},
        {"attn_mask": MASK},
        {"attn_mask": some(2, 1, 5, 7, seed=4)},
        {"enable_gqa": True},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_weights_mix_the_values_as_the_attention_of_torch_does(options):
    heads = 2 if options.get("enable_gqa") else 4
    q, k, v = some(2, 4, 5, 8), some(2, heads, 7, 8, seed=1), some(2, heads, 7, 8, seed=2)
    weights = attention_weights(q, k, v, **options)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))
    values = v.repeat_interleave(4 // heads, dim=1)
    torch.testing.assert_close(weights @ values, F.scaled_dot_product_attention(q, k, v, **options))


@pytest.mark.parametrize(
    "switches",
    [{}, {"field_aware": True}, {"n_head": 4, "n_kv_head": 2, "qkv_bias": True}, {"grammar": True}],
    ids=lambda switches: next(iter(switches), "plain"),
)
def test_the_attention_seen_is_what_the_model_mixes_its_values_by(switches, monkeypatch):
    model, given = lookable(**switches), []
    weights_of, heads = attention_weights, model.gpt.config.n_head
    monkeypatch.setattr(hooks, "attention_weights", lambda *a, **k: given.append((a, k)) or weights_of(*a, **k))
    seen = look_inside(model, WINDOW)
    assert len(given) == len(seen.attention) == 2
    for weights, (arguments, options) in zip(seen.attention, given, strict=True):
        assert weights.shape == (heads, len(WINDOW), len(WINDOW)) and not weights.triu(1).any()
        torch.testing.assert_close(weights.sum(-1), torch.ones(heads, len(WINDOW)))
        mixed = F.scaled_dot_product_attention(*arguments, **options)[0]
        values = arguments[2][0].repeat_interleave(heads // arguments[2].shape[1], dim=0)
        torch.testing.assert_close(weights.double() @ values, mixed, rtol=1e-5, atol=1e-6)
    assert seen.attention[0].std() > 0.01  # not all alike


@pytest.mark.parametrize("field_aware", [False, True])
def test_the_stream_goes_from_the_embedding_to_what_the_head_reads(field_aware):
    model, tokens = lookable(field_aware), torch.from_numpy(WINDOW)[None]
    seen = look_inside(model, WINDOW)
    assert [tuple(layer.shape) for layer in seen.stream] == [(len(WINDOW), 32)] * 3
    with torch.no_grad():
        embedded = model.gpt.embedding(tokens)[0]
        if field_aware:
            embedded = embedded + model.gpt.fields(read_fields(tokens)[0])[0]
        torch.testing.assert_close(seen.stream[0], F.rms_norm(embedded, (32,)).float())
        torch.testing.assert_close(seen.stream[-1], model.gpt.states(tokens)[0].float())
    assert (seen.stream[1] - seen.stream[0]).abs().max() > 0.1


def test_before_training_blocks_hand_on_what_they_take():
    model = lookable()
    model = type(model)(GPT(model.gpt.config).eval(), model.device)
    first, second, third = look_inside(model, WINDOW).stream
    assert torch.equal(first, second) and torch.equal(second, third)


def test_a_look_leaves_nothing_behind():
    model, tokens = lookable(), torch.from_numpy(WINDOW)[None]
    with torch.no_grad():
        before = model.gpt(tokens)
        look_inside(model, WINDOW)
        assert torch.equal(model.gpt(tokens), before)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.gpt.blocks)


def test_a_look_that_fails_leaves_nothing_behind_either(monkeypatch):
    model = lookable()
    monkeypatch.setattr(hooks, "attention_weights", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        look_inside(model, WINDOW)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.gpt.blocks)


def test_a_window_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match=r"the window has 200 tokens, and the model reads 192"):
        look_inside(lookable(), np.zeros(200, dtype=np.int64))
