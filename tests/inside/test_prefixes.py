"""Prefixes have the median RTT of their replies and the vectors that the model gives them."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import make_row, write_rows
from lookable import lookable

from ping_llm.data import tokenization as tk
from ping_llm.data.rows import RowReader
from ping_llm.inference.engine import LEAST_MASS
from ping_llm.inference.query import Endpoint
from ping_llm.inside import prefixes as module
from ping_llm.inside.prefixes import Prefixes, imagined_prefixes, measured_prefixes, prefix_maps, vectors
from ping_llm.inside.projection import explained_by_neighbours, scaled
from ping_llm.model.fields import read_fields

B = tk.BYTE_0
ENDS = [Endpoint.parse(text) for text in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "198.51.7.0/24")]


def test_medians_are_of_the_replies_to_each_prefix_and_the_most_replied_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LEAST_PREFIXES", 1)
    rows = [make_row(200, seed=seed, probe_id=seed) for seed in range(3)]
    reader = RowReader(write_rows(tmp_path, {"train": rows}), "train")
    ipv4, ipv6 = measured_prefixes(reader, 24, 48)
    assert [str(end) for end in ipv4.ends] == ["198.51.100.0/24"] and str(ipv6.ends[0]) == "2001:db8::/48"
    for found, is_ipv4 in ((ipv4, True), (ipv6, False)):
        rtts = [row.rtt_ms[(row.dst_is_ipv4[row.dst] == is_ipv4) & (row.rtt_ms >= 0)] for row in rows]
        assert found.replies.tolist() == [sum(map(len, rtts))]
        assert found.median_ms[0] == pytest.approx(np.median(np.concatenate(rtts)))


def test_a_map_needs_some_prefixes_and_shows_the_most_replied(tmp_path, monkeypatch):
    row = make_row(4000, seed=3, ipv6_share=0)
    row.dst_addresses[:, 14] = np.arange(20)  # 20 prefixes /24
    reader = RowReader(write_rows(tmp_path, {"train": [row]}, shards=1), "train")
    monkeypatch.setattr(module, "MOST_PREFIXES", 6)
    (found,) = measured_prefixes(reader, 24, 48)
    replies = np.bincount(row.dst[row.rtt_ms >= 0], minlength=20)
    assert found.replies.tolist() == sorted(replies.tolist(), reverse=True)[:6]
    third = [int(str(end).split(".")[2]) for end in found.ends]
    assert replies[third].tolist() == found.replies.tolist()
    assert measured_prefixes(reader, 16, 48) == []


def test_of_many_measurements_some_rows_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LEAST_PREFIXES", 1)
    monkeypatch.setattr(module, "_MEASUREMENTS", 300)
    rows = [make_row(200, seed=seed, probe_id=seed, ipv6_share=0) for seed in range(6)]
    (found,) = measured_prefixes(RowReader(write_rows(tmp_path, {"train": rows}, shards=1), "train"), 24, 48)
    assert found.replies.tolist() == [sum(int((row.rtt_ms >= 0).sum()) for row in rows[::4])]


def test_the_embedding_is_what_the_table_of_prefixes_adds_after_the_last_byte():
    model = lookable(field_aware=True)
    tokens = torch.tensor([[tk.MEASUREMENT_START, tk.DST_IPV4, *(B + byte for byte in end.known)] for end in ENDS])
    found = vectors(model, ENDS, "embedding")
    with torch.no_grad():
        model.gpt.fields.places.weight.zero_()
        added = model.gpt.fields(read_fields(tokens)[0])[:, -1]
    np.testing.assert_allclose(found, added, rtol=1e-6)
    assert len(np.unique(found[:, 0])) > 1


@pytest.mark.parametrize("field_aware", [False, True])
def test_states_are_those_after_the_prefix_and_after_the_token_that_begins_an_rtt(field_aware):
    model = lookable(field_aware)
    for of, after in (("state", []), ("answer", [tk.RTT_START])):
        for end, vector in zip(ENDS, vectors(model, ENDS, of), strict=True):
            line = [tk.MEASUREMENT_START, tk.DST_IPV4, *(B + byte for byte in end.known), *after]
            with torch.no_grad():
                state = model.gpt.states(torch.tensor([line]))[0, -1]
            np.testing.assert_allclose(vector, scaled(state.numpy()), rtol=1e-5, atol=1e-6)


def test_a_model_without_a_table_of_prefixes_has_no_embedding_of_them():
    with pytest.raises(ValueError, match=r"model\.field_aware is off"):
        vectors(lookable(), ENDS, "embedding")


@pytest.mark.parametrize("field_aware", [False, True])
def test_a_map_is_of_the_embedding_where_there_is_one(field_aware):
    ends = [Endpoint.parse(f"198.51.{i}.0/24") for i in range(9)]
    prefixes = Prefixes(ends, np.geomspace(5, 500, 9), np.arange(9, 0, -1))
    maps = prefix_maps(lookable(field_aware), prefixes)
    assert [one.of for one in maps] == ["embedding" if field_aware else "state", "answer"]
    for one in maps:
        assert one.places.shape == (9, 2) and 0 < one.shares.sum() <= 1
        points = vectors(lookable(field_aware), ends, one.of)
        assert one.explained == pytest.approx(explained_by_neighbours(points, np.log(prefixes.median_ms)))


def test_without_rows_the_model_says_the_medians_of_the_public_networks():
    model = dataclasses.replace(lookable(), least_mass=LEAST_MASS)
    (found,) = imagined_prefixes(model)
    texts = [str(end) for end in found.ends]
    assert {"1.0.0.0/8", "223.0.0.0/8"} <= set(texts) and not {"10.0.0.0/8", "127.0.0.0/8"} & set(texts)
    assert not found.replies.any()
    place = texts.index("8.0.0.0/8")
    assert found.median_ms[place] == pytest.approx(model.rtt(None, "8.0.0.0/8").median, rel=1e-6)
