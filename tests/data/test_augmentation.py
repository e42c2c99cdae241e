"""Pseudonyms keep what addresses share; shifted pairs teach nothing false; both are drawn from an rng alone."""

from __future__ import annotations

import numpy as np
import torch
from conftest import make_row
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_decoder import decode

from ping_llm.config import FIELDS, Config, DataConfig, ModelConfig, TrainConfig
from ping_llm.data import tokenization as tk
from ping_llm.data.augmentation import pseudonyms, shift_pairs
from ping_llm.data.measurement import IPV4_MAPPED_PREFIX, is_ipv4, pack_address
from ping_llm.data.rows import ProbeRow
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


@settings(max_examples=300)
@given(addresses, st.integers(0, 1000), st.integers(0, 12))
def test_two_pseudonyms_share_as_many_bits_as_the_addresses_did(numbers, seed, sources):
    packed = np.stack([np.frombuffer(number.to_bytes(16, "big"), np.uint8) for number in numbers + numbers[:1]])
    src, dst = packed[:sources], packed[sources:]
    told = np.concatenate(pseudonyms(src, dst, np.random.default_rng(seed)))
    assert (told == np.concatenate(pseudonyms(src, dst, np.random.default_rng(seed)))).all()
    assert (told[0] == told[-1]).all()  # equal hosts stay equal, as source and as destination
    ipv4 = is_ipv4(packed)
    assert (told[ipv4, :12] == packed[ipv4, :12]).all()  # and of their family
    for i in range(len(packed)):
        for j in range(i):
            if ipv4[i] == ipv4[j]:
                assert shared_bits(told[i], told[j]) == shared_bits(packed[i], packed[j])


def test_below_a_random_length_half_of_the_bits_change_and_above_it_none():
    packed = np.stack([np.frombuffer(pack_address(text), np.uint8) for text in ("192.0.2.1", "2001:db8::1")])
    changed, nothing = np.zeros((2, 128)), packed[:0]
    for seed in range(6000):  # each is the only source, of which two thirds of the draws tell
        for i in range(2):
            told, _ = pseudonyms(packed[i : i + 1], nothing, np.random.default_rng(seed))
            changed[i] += np.unpackbits(told[0] ^ packed[i])
    changed /= 4000
    assert not changed[0, :96].any()
    # Bit n of 32 lies below the kept length in (n + 1)/32 of the draws; of IPv6 bit n of 64 likewise, later ones always.
    np.testing.assert_allclose(changed[0, 96:], np.arange(1, 33) / 64, atol=0.05)
    np.testing.assert_allclose(changed[1], np.minimum(np.arange(1, 129) / 64, 1) / 2, atol=0.05)


def test_of_several_networks_some_or_all_are_told_by_pseudonyms():
    src = np.random.default_rng(0).integers(256, size=(40, 16), dtype=np.uint8)
    shares = []
    for seed in range(400):
        told, _ = pseudonyms(src, src[:0], np.random.default_rng(seed))
        shares.append((told != src).any(axis=1).mean())
    shares = np.array(shares)[np.array(shares) > 0]
    assert 0.4 < (shares > 0.99).mean() < 0.65 and 0.3 < ((shares > 0.15) & (shares < 0.85)).mean() < 0.55


def test_a_third_of_the_draws_each_tell_of_sources_of_destinations_and_of_both():
    rng = np.random.default_rng(0)
    src, dst = rng.integers(256, size=(2, 40, 16), dtype=np.uint8)
    src[:, :12] = np.frombuffer(IPV4_MAPPED_PREFIX, np.uint8)  # of two families, which share no network
    ends = [pseudonyms(src, dst, np.random.default_rng(seed)) for seed in range(900)]
    kinds = np.array([[(one != src).any(), (other != dst).any()] for one, other in ends])
    for kind in ([True, False], [False, True], [True, True]):
        assert abs((kinds == kind).all(axis=1).mean() - 1 / 3) < 0.06


@settings(max_examples=200)
@given(pings, st.integers(0, 500), st.booleans())
def test_a_shifted_pair_has_one_factor_or_two_and_only_the_first_answer_under_each_is_not_foretold(
    measured, seed, in_time
):
    pair, rtt_ms = np.array([p for p, _ in measured]), np.array([r for _, r in measured], dtype=np.float32)
    shifted, unforetold = shift_pairs(pair, rtt_ms, in_time, np.random.default_rng(seed))
    for number in set(pair.tolist()):
        own = np.flatnonzero((pair == number) & (rtt_ms > 0))
        factors = shifted[own] / rtt_ms[own]
        assert ((np.exp(-2) * 0.999 <= factors) & (factors <= np.exp(2) * 1.001)).all()
        changes = np.flatnonzero(np.abs(np.diff(factors)) > 1e-4)
        assert len(changes) <= int(in_time)
        expected = np.zeros(len(own), dtype=bool)
        if len(own) and (np.abs(factors - 1) > 1e-6).any():
            expected[[0, *(changes + 1)]] = True
        assert (unforetold[own] == expected).all()
    assert (shifted[rtt_ms < 0] == -1).all() and not unforetold[rtt_ms < 0].any()


def test_three_in_ten_shifted_pairs_drift_where_the_order_is_that_of_time():
    pair, rtt_ms = np.repeat(np.arange(200), 50), np.full(10_000, 20.0, dtype=np.float32)
    order = np.random.default_rng(1).permutation(10_000)
    for in_time, share in ((True, 0.3), (False, 0.0)):
        shifted, _ = shift_pairs(pair[order], rtt_ms, in_time, np.random.default_rng(2))
        factors = [np.unique(shifted[pair[order] == number]) for number in range(200)]
        moved = [own for own in factors if (own != 20).any()]
        assert len(moved) > 50
        assert abs(np.mean([len(own) == 2 for own in moved]) - share) < (0.12 if share else 1e-9)


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
    sums, totals = sums[: len(FIELDS)], totals[: len(FIELDS)]  # the bytes of RTTs are counted once more after them
    assert totals.sum() == counted.sum()
    torch.testing.assert_close(sums.sum() / totals.sum().float(), nats)


def test_a_shift_is_of_source_and_destination_and_drifts_in_windows_in_time_order_alone():
    """Two sources ping one destination in 20 ms: with a factor for each, and two only where time is told."""
    packed = np.array([list(pack_address(text)) for text in ("192.0.2.1", "192.0.2.2", "198.51.100.1")], dtype=np.uint8)
    turns, zeros = np.arange(400) % 2, np.zeros(400, dtype=np.int64)
    columns = (zeros, turns, zeros, np.full(400, 20, np.float32), zeros.astype(np.uint8), packed[:2], packed[2:])
    row = ProbeRow.from_codes(1, 1_700_000_000 + 60 * np.arange(400), *columns)
    drifts, apart = {}, {}
    for full_time in (0.0, 1.0):
        config = DataConfig(
            full_time=full_time, partial_time=0, src_prefix_dropout=0, dst_prefix_dropout=0, shifted_pairs=1
        )
        windows = [sample_window(row, config, 300, np.random.default_rng(seed)) for seed in range(60)]
        rtts = [[set(w.rtt_ms[row.src[w.index] == source].tolist()) for source in range(2)] for w in windows]
        drifts[full_time] = sum(len(own) == 2 for of_window in rtts for own in of_window)
        apart[full_time] = sum(not one & other for one, other in rtts)
        assert all(1 <= len(own) <= 2 for of_window in rtts for own in of_window)
    assert drifts[0.0] == 0 and 5 < drifts[1.0] < 50  # 0.3 of the shifted ones of 120
    assert min(apart.values()) > 30


def test_factors_are_log_normal_and_between_a_third_and_all_of_the_pairs_have_one():
    pair, rtt_ms, shares, logs = np.arange(2000), np.full(2000, 20.0), [], []
    for seed in range(60):
        log_factor = np.log(shift_pairs(pair, rtt_ms, False, np.random.default_rng(seed))[0] / 20)
        shares.append((log_factor != 0).mean())
        logs.append(log_factor[log_factor != 0])
    drawn = np.concatenate(logs)
    assert abs(drawn.std() - 0.7) < 0.02 and abs(drawn.mean()) < 0.02
    assert abs(drawn).max() < 2.001 and 0.001 < (abs(drawn) > 1.999).mean() < 0.01  # P(|z| > 2 / 0.7) = 0.004
    assert 0.25 < min(shares) < 0.4 and max(shares) > 0.9
