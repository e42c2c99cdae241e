"""Pseudonyms keep what addresses share; shifted pairs teach nothing false; both are drawn from an rng alone."""

from __future__ import annotations

import numpy as np
import torch
from conftest import make_row
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_decoder import decode

from ping_llm.config import Config, DataConfig, ModelConfig, TrainConfig
from ping_llm.data import tokenization as tk
from ping_llm.data.augmentation import pseudonyms, shift_pairs
from ping_llm.data.measurement import is_ipv4, pack_address
from ping_llm.data.windows import encode_windows, sample_window
from ping_llm.model.gpt import GPT
from ping_llm.training.distributed import Ranks
from ping_llm.training.objective import Objective

MODEL = ModelConfig(n_layer=1, n_embd=32, n_head=2, seq_len=128)
pings = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([-1.0, 5.0, 80.0])), min_size=1, max_size=30)
addresses = st.lists(
    st.one_of(st.integers(0, 2**32 - 1).map(lambda n: (0xFFFF << 32) + n), st.integers(1 << 96, 2**128 - 1)),
    min_size=2,
    max_size=12,
)


def shared_bits(one: np.ndarray, other: np.ndarray) -> int:
    differing = np.flatnonzero(np.unpackbits(one) != np.unpackbits(other))
    return int(differing[0]) if len(differing) else 128


@settings(max_examples=200)
@given(addresses, st.integers(0, 1000))
def test_two_pseudonyms_share_as_many_bits_as_the_addresses_did(numbers, seed):
    packed = np.stack([np.frombuffer(number.to_bytes(16, "big"), np.uint8) for number in numbers + numbers[:1]])
    given_ = pseudonyms(packed, np.random.default_rng(seed))
    assert (given_ == pseudonyms(packed, np.random.default_rng(seed))).all()
    assert (given_[0] == given_[-1]).all()  # equal hosts stay equal
    ipv4 = is_ipv4(packed)
    assert (given_[ipv4, :12] == packed[ipv4, :12]).all()  # and of their family
    changed = np.flatnonzero((given_ != packed).any(axis=1))
    for i in changed:
        for j in changed:
            if ipv4[i] == ipv4[j]:
                assert shared_bits(given_[i], given_[j]) == shared_bits(packed[i], packed[j])


def test_below_a_random_length_half_of_the_bits_change_and_above_it_none():
    packed = np.stack([np.frombuffer(pack_address(text), np.uint8) for text in ("192.0.2.1", "2001:db8::1")])
    changed = np.zeros((2, 128))
    for seed in range(4000):
        changed += np.unpackbits(pseudonyms(packed, np.random.default_rng(seed)) ^ packed, axis=1)
    changed /= 4000 * 0.75  # all of them in half of the draws, half of them in the others
    assert not changed[0, :96].any()
    # Bit n of 32 lies below the kept length in (n + 1)/32 of the draws; of IPv6 bit n of 64 likewise, later ones always.
    np.testing.assert_allclose(changed[0, 96:], np.arange(1, 33) / 64, atol=0.05)
    np.testing.assert_allclose(changed[1], np.minimum(np.arange(1, 129) / 64, 1) / 2, atol=0.05)


@settings(max_examples=100)
@given(pings, st.integers(0, 500))
def test_a_shifted_pair_has_one_factor_and_only_its_first_answer_is_not_foretold(measured, seed):
    pair, rtt_ms = np.array([p for p, _ in measured]), np.array([r for _, r in measured], dtype=np.float32)
    shifted, unforetold = shift_pairs(pair, rtt_ms, np.random.default_rng(seed))
    for number in set(pair.tolist()):
        own = np.flatnonzero((pair == number) & (rtt_ms > 0))
        factors = shifted[own] / rtt_ms[own]
        assert len(own) == 0 or (np.ptp(factors) < 1e-4 and np.exp(-2) * 0.999 <= factors[0] <= np.exp(2) * 1.001)
        expected = np.zeros(len(own), dtype=bool)
        if len(own) and abs(factors[0] - 1) > 1e-6:
            expected[0] = True
        assert (unforetold[own] == expected).all()
    assert (shifted[rtt_ms < 0] == -1).all() and not unforetold[rtt_ms < 0].any()


def test_windows_tell_of_pseudonyms_and_shifted_pairs_as_often_as_the_config_says():
    row, none = make_row(2000, ipv6_share=0), {"full_time": 1.0, "partial_time": 0.0}
    for name in ("pseudonyms", "shifted_pairs", "canonical_order"):
        config = DataConfig(**none, src_prefix_dropout=0, dst_prefix_dropout=0, **{name: 0.3})
        counts = np.zeros(3)
        for seed in range(600):
            window = sample_window(row, config, 300, np.random.default_rng(seed))
            ends = (
                (window.src != row.src_addresses[row.src[window.index]]).any(),
                (window.dst != row.dst_addresses[row.dst[window.index]]).any(),
            )
            counts += any(ends), window.muted.any(), (window.order == window.order[0]).all()
            assert not window.muted.any() or (window.order == tk.RESULT_LAST).all()  # what follows would learn from it
        expected = {"pseudonyms": (0.3, 0, 0), "shifted_pairs": (0, 0.3, 0.3), "canonical_order": (0, 0, 0.3)}[name]
        np.testing.assert_allclose(counts / 600, expected, atol=0.06)


def test_muted_tokens_are_read_but_no_targets():
    """The loss over a window in which an RTT is muted is that over all its other tokens, by hand."""
    row = make_row(400, ipv6_share=0)
    config = Config(model=MODEL, train=TrainConfig(precision="fp32"))
    config_shifted = DataConfig(src_prefix_dropout=0, dst_prefix_dropout=0, shifted_pairs=1.0)
    windows = [sample_window(row, config_shifted, 129, np.random.default_rng(seed)) for seed in range(4)]
    tokens = torch.from_numpy(encode_windows(windows, 129)).long()
    muted = tokens <= tk.MUTED
    begun = tokens[:, :-2] == tk.RTT_START
    assert muted.any() and torch.equal(muted[:, 1:-1] & begun, muted[:, 2:] & begun)  # both bytes of an RTT, or none
    assert muted.sum() == 2 * (muted[:, 1:-1] & begun).sum()
    plain = torch.where(muted, tk.MUTED - tokens, tokens)
    for line, window in zip(plain, windows, strict=True):
        decoded = decode(line[line >= 0].numpy())
        assert np.allclose([m.rtt_ms for m in decoded], window.rtt_ms[: len(decoded)], rtol=3e-4)
    gpt = GPT(config.model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gpt.head.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
        objective = Objective(config, gpt, Ranks(torch.device("cpu")))
        log_p = gpt(plain[:, :-1].clamp(min=0)).log_softmax(-1)
        targets = plain[:, 1:]
        counted = (targets >= 0) & ~muted[:, 1:]
        nats = -log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0][counted].mean()
    sums, totals = objective.backward(tokens)
    assert totals.sum() == counted.sum()
    torch.testing.assert_close(sums.sum() / totals.sum().float(), nats)
