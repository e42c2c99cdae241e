"""Claims about the dictionary of n-grams, and about the tables that are looked up by it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_gpt import plain_codewords
from switches import PLAIN
from test_model import random_tokens

from ping_llm.config import ModelConfig
from ping_llm.model.codewords import Codewords, lzw
from ping_llm.model.gpt import GPT
from ping_llm.model.lookup import Lookup, _Look

CONFIG = dataclasses.replace(PLAIN, lookup_rows=300, lookup_length=4)
few = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), max_size=8)


def words_of(parents: np.ndarray, tokens: np.ndarray) -> list[tuple[int, ...]]:
    words: list[tuple[int, ...]] = []
    for parent, token in zip(parents.tolist(), tokens.tolist(), strict=True):
        words.append((*(words[parent] if parent >= 0 else ()), token))
    return words


def plain_lzw(windows: list[list[int]], rows: int, length: int) -> list[tuple[int, ...]]:
    """Word by word, as Welch says it, but for words that are as long as they may be: those end there."""
    words = [(token,) for token in range(267)]
    for window in windows:
        word = ()
        for token in window:
            longer = (*word, token)
            if len(longer) > length:
                longer = (token,)
            elif longer not in words:
                if len(words) == rows:
                    return words
                words.append(longer)
                longer = (token,)
            word = longer
    return words


def test_a_dictionary_by_hand():
    """ "abababa" of bytes 20 and 21: ab, ba, aba, then a second window: ab is known, abb is new."""
    parents, tokens = lzw([np.array([20, 21, 20, 21, 20, 21, 20]), np.array([20, 21, 21, -1, 20])], 400, 3)
    assert words_of(parents, tokens)[267:] == [(20, 21), (21, 20), (20, 21, 20), (20, 21, 21)]
    assert words_of(*lzw([np.array([20, 21, 20, 21, 20, 21, 20])], 400, 2))[267:] == [(20, 21), (21, 20)]


@given(few, st.integers(268, 290), st.integers(2, 5))
def test_the_dictionary_is_that_of_plain_lzw(windows, rows, length):
    expected = plain_lzw(windows, rows, length)
    assert words_of(*lzw([np.array(window) for window in windows], rows, length)) == expected


@settings(deadline=None)
@given(few, st.lists(st.integers(-1, 3), min_size=1, max_size=20))
def test_the_codewords_that_end_at_a_token_are_those_that_a_search_finds(windows, line):
    codewords = Codewords(CONFIG)
    codewords.fill(*lzw([np.array(window) for window in windows], 300, 4))
    words, found = plain_codewords(codewords), codewords(torch.tensor([line]))[0].tolist()
    for end, rows in enumerate(found, 1):
        ngrams = [tuple(line[max(0, end - n) : end]) if n <= end else None for n in range(1, 5)]
        expected = [words.get(ngram, -1) for ngram in ngrams]
        assert rows[1:] == expected[1:]
        assert rows[0] == (expected[0] if line[end - 1] >= 0 else words[(0,)])


def test_rows_lie_by_the_last_tokens_of_their_codewords():
    codewords, windows = Codewords(CONFIG), [np.array([20, 21, 20, 22, 20, 21, 21, 22])]
    codewords.fill(*lzw(windows, 300, 4))
    words = plain_codewords(codewords)
    last = [word[-1] for word, _ in sorted(words.items(), key=lambda item: item[1])]
    assert last == sorted(last) and sorted(words.values()) == list(range(len(words))) and len(words) > 267


def test_a_dictionary_has_the_same_shapes_whatever_it_holds_and_is_saved():
    model = GPT(CONFIG)
    before = {name: value.shape for name, value in model.state_dict().items()}
    model.codewords.fill(*lzw(random_tokens(2, 60).numpy(), 300, 4))
    assert {name: value.shape for name, value in model.state_dict().items()} == before
    other = GPT(CONFIG)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens := random_tokens(2, 30)), model(tokens))


def test_an_empty_dictionary_finds_the_tokens_themselves():
    tokens = random_tokens(2, 9)
    rows = Codewords(CONFIG)(tokens)
    assert torch.equal(rows[..., 0], tokens) and (rows[..., 1:] == -1).all()


def test_a_model_begins_without_its_tables_and_they_learn():
    model, tokens = GPT(CONFIG), random_tokens(2, 20)
    plain = GPT(PLAIN)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in plain.state_dict()})
    assert torch.equal(model(tokens), plain(tokens))
    assert [block.lookup is not None for block in model.blocks] == [False, True, True]
    model.head.weight.data.normal_()
    model(tokens).square().sum().backward()
    assert model.blocks[1].lookup.mix.weight.grad.any()


@pytest.mark.parametrize(("layers", "expected"), [(1, {0}), (2, {0, 1}), (4, {1, 2}), (20, {6, 13})])
def test_tables_stand_at_a_third_and_two_thirds_of_the_depth(layers, expected):
    assert dataclasses.replace(CONFIG, n_layer=layers).lookup_layers == expected
    assert not dataclasses.replace(PLAIN, n_layer=layers).lookup_layers


def test_gradients_of_a_look_are_those_of_its_differences():
    generator = torch.Generator().manual_seed(0)
    x, table = (torch.randn(*shape, generator=generator).double().requires_grad_() for shape in ((2, 3, 4), (6, 4)))
    rows = torch.randint(-1, 6, (2, 3, 3), generator=generator)
    rows[..., 0] = torch.tensor([2, 2, 5])
    assert torch.autograd.gradcheck(lambda x, table: _Look.apply(x, table, rows), (x, table))


def test_a_look_keeps_nothing_that_is_larger_than_its_input_but_the_table():
    kept, x = [], torch.randn(2, 10, 32, requires_grad=True)
    lookup, rows = Lookup(ModelConfig(n_embd=32, n_head=2, lookup_rows=300)), torch.zeros(2, 10, 8, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        _Look.apply(x, lookup.rows.weight, rows)
    others = [tensor for tensor in kept if tensor.data_ptr() != lookup.rows.weight.data_ptr()]
    assert len(others) == len(kept) - 1 and max(tensor.numel() for tensor in others) <= x.numel()
