"""Claims about a model that reads sources as networks: hosts of a network are one to it, wherever their bytes come from."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_legal import walk
from test_model import SMALL

from ping_llm.config import ModelConfig
from ping_llm.data import tokenization as tk
from ping_llm.model.gpt import GPT, KVCache


def slowly(tokens: list[int], ipv4: int, ipv6: int) -> list[int]:
    read, role, index = [], None, 0
    for token in tokens:
        role, index = (token, 0) if 0 <= token < tk.BYTE_0 else (role, index + 1)
        most = {tk.SRC_IPV4: ipv4, tk.SRC_IPV6: ipv6}.get(role, 99)
        read.append(tk.BYTE_0 if index > most and token >= tk.BYTE_0 else token)
    return read


@pytest.fixture(scope="module", params=["plain", "field_aware", "grammar"])
def model(request) -> GPT:
    extra = {"field_aware": request.param == "field_aware", "grammar": request.param == "grammar"}
    config = dataclasses.replace(SMALL, prefix_rows=64, src_bits_ipv4=24, src_bits_ipv6=48, **extra)
    gpt, generator = GPT(config).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return gpt


@pytest.mark.parametrize("seed", range(6))
def test_windows_are_read_as_token_by_token(model, seed):
    tokens = [*walk(seed, 60)[0], tk.PADDING, tk.PADDING]
    assert model.as_read(torch.tensor([tokens]))[0].tolist() == slowly(tokens, 3, 6)


def test_a_model_that_reads_all_of_a_source_changes_no_window():
    windows = torch.tensor([walk(0, 60)[0]])
    assert GPT(SMALL).as_read(windows) is windows


@torch.no_grad()
def test_nothing_depends_on_the_bytes_that_are_not_read(model):
    token = {name: getattr(tk, name) for name in ("SRC_IPV4", "SRC_IPV6", "DST_IPV4")}
    start, dst = [tk.MEASUREMENT_START], [token["DST_IPV4"], 60, 70, 80, 90]
    for role, width, read in ((token["SRC_IPV4"], 4, 3), (token["SRC_IPV6"], 16, 6)):
        source = [20 + i for i in range(width)]
        for changed in range(width):
            other = [*source[:changed], 222, *source[changed + 1 :]]
            pair = torch.tensor([[*start, role, *source, *dst], [*start, role, *other, *dst]])
            whole = model(pair)[:, -1]
            cache = KVCache()
            pieces = [model(part, cache) for part in pair.split([2 + width // 2, pair.shape[1] - 2 - width // 2], 1)]
            side = KVCache()
            model(pair[:, :2], side)
            apart = model(pair[:, 2:].repeat(1, 2), side, branches=2)
            for logits in (whole, pieces[-1][:, -1], apart[:, -1], apart[:, apart.shape[1] // 2 - 1]):
                torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
                assert ((logits[0] - logits[1]).abs().max() < 1e-4) == (changed >= read)
    near, far = torch.tensor([[*start, *dst]]), torch.tensor([[*start, *dst[:-1], 91]])
    assert (model(near)[:, -1] - model(far)[:, -1]).abs().max() > 1e-3  # all of a destination is read


@pytest.mark.parametrize("bits", [{"src_bits_ipv4": 20}, {"src_bits_ipv6": 47}])
def test_the_bits_of_a_source_are_whole_bytes(bits):
    with pytest.raises(ValueError, match="must be a multiple of 8: the model reads whole bytes"):
        ModelConfig(**bits)
