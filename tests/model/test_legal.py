"""Claims about a model that holds to the grammar: what is illegal has no probability, all else is as it was."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import SMALL

from ping_llm.data import tokenization as tk
from ping_llm.inference.grammar import Grammar
from ping_llm.model.fields import read_fields
from ping_llm.model.gpt import GPT, KVCache
from ping_llm.model.legal import ILLEGAL, legal_states, legal_table, place_table

TABLE, PLACES = legal_table(tk.VOCAB_SIZE), place_table()


def walk(seed: int, length: int) -> tuple[list[int], np.ndarray]:
    """Random legal tokens, and what was legal after each, (T, V): sources need not be cut alike, as in a mesh."""
    rng, grammar, tokens, legal = np.random.default_rng(seed), Grammar(1, whole_addresses=False), [], []
    free = grammar.least.copy(), grammar.most.copy()
    for _ in range(length):
        may = np.flatnonzero(grammar.legal()[0])
        roles, others = may[may < tk.BYTE_0], may[may >= tk.BYTE_0]
        token = rng.choice(roles if len(roles) and (not len(others) or rng.random() < 0.3) else others)
        grammar.advance(np.array([token]))
        grammar.least[:], grammar.most[:] = free
        tokens.append(int(token))
        legal.append(grammar.legal()[0])
    return tokens, np.array(legal)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 150))
def test_the_mask_is_the_grammar_but_for_the_values_of_bytes(seed, length):
    tokens, legal = walk(seed, length)
    mask = TABLE[legal_states(read_fields(torch.tensor([tokens]))[0], PLACES)][0].numpy()
    np.testing.assert_array_equal(mask[:, : tk.BYTE_0], legal[:, : tk.BYTE_0])
    bytes_ = mask[:, tk.BYTE_0 :]
    assert (bytes_.all(axis=1) == bytes_.any(axis=1)).all()
    np.testing.assert_array_equal(bytes_.any(axis=1), legal[:, tk.BYTE_0 :].any(axis=1))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "field_aware"])
def models(request) -> tuple[GPT, GPT]:
    """The same weights, with all tokens and with the legal ones."""
    pair = []
    for grammar in (False, True):
        config = dataclasses.replace(SMALL, field_aware=request.param, prefix_rows=64, grammar=grammar)
        model, generator = GPT(config).eval(), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3, generator=generator)
        pair.append(model)
    return pair[0], pair[1]


@torch.no_grad()
def test_legal_tokens_keep_their_logits_and_the_others_have_no_probability(models):
    tokens, _ = walk(3, 64)
    everything, held = (model(torch.tensor([tokens]))[0] for model in models)
    mask = TABLE[legal_states(read_fields(torch.tensor([tokens]))[0], PLACES)][0]
    assert torch.equal(held, torch.where(mask, everything, ILLEGAL))
    assert (held.softmax(-1)[~mask] == 0).all()
    assert (everything.softmax(-1)[~mask] > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_the_same_is_legal_over_a_cache_and_side_by_side(models, seed):
    model, tokens = models[1], torch.tensor([walk(seed, 40)[0], walk(seed + 9, 40)[0]])
    whole, cache = model(tokens), KVCache()
    pieces = torch.cat([model(part, cache) for part in tokens.split([1, 11, 2, 16, 10], dim=1)], dim=1)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
    read = KVCache()
    model(tokens[:, :37], read)
    branches = torch.cat([tokens[:, 37:], tokens[:, 37:]], dim=1)
    torch.testing.assert_close(model(branches, read, branches=2), whole[:, 37:].repeat(1, 2, 1), rtol=1e-4, atol=1e-4)


def test_padding_and_a_target_without_probability_make_no_nan(models):
    tokens = torch.tensor([[*walk(1, 20)[0], *[-1] * 12], [11] * 32])
    logits = models[1](tokens)
    assert logits.isfinite().all()
    logits.log_softmax(-1).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in models[1].parameters() if parameter.grad is not None)


def test_the_mask_adds_no_weight_and_nothing_to_a_checkpoint(models):
    everything, held = (model.state_dict() for model in models)
    assert everything.keys() == held.keys()
