"""What is fitted to a kind of query rests on many hosts, or is fitted to more kinds together."""

import numpy as np

from ping_llm.eval.baselines.base import Buckets, Hosts, bucket_keys, well_founded


def hosts(sources, prefixes):
    return Hosts(np.asarray(sources), np.asarray(prefixes))


def test_one_source_with_many_queries_is_no_bucket_of_its_own():
    """600 cases of kind 8, of one source to two prefixes, beside 4,000 of kind 4 of 100 sources to 80 prefixes."""
    source = np.r_[np.full(600, 1000), np.arange(4000) % 100]
    prefix = np.r_[np.arange(600) % 2, 10 + np.arange(4000) % 80]
    key = np.r_[np.full(600, 8), np.full(4000, 4)]
    assert well_founded(key, hosts(source, prefix), least=100).tolist() == [4]
    assert well_founded(key, hosts(np.arange(4600), prefix), least=100).tolist() == [4]  # many sources, two prefixes
    assert well_founded(key, hosts(source, np.arange(4600)), least=100).tolist() == [4]  # one source, many prefixes
    assert well_founded(key, hosts(np.arange(4600), np.arange(4600)), least=601).tolist() == [4]  # too few cases
    assert well_founded(key, hosts(np.arange(4600), np.arange(4600)), least=600).tolist() == [4, 8]


def test_thirty_sources_are_enough_and_half_of_all_where_there_are_fewer_than_sixty():
    for total, enough in ((200, 30), (60, 30), (40, 20), (5, 3)):
        for count in (enough - 1, enough):
            key, ids = np.r_[np.zeros(count), np.ones(total - count)].astype(int), np.arange(total)
            assert (0 in well_founded(key, hosts(ids, ids))) == (count == enough)
            assert (0 in well_founded(key, hosts(ids, np.zeros(total)))) == (count == enough)


def test_a_bucket_without_hosts_answers_from_all_queries_with_a_new_endpoint():
    """Kinds 0, 4 (destination known) and 8 (neither): 8 has one source, so it answers as 4 and 8 together, not as all."""
    kinds = np.stack([np.repeat([0, 4, 8], [300, 300, 100]), np.zeros(700, int)], axis=1)
    source = np.r_[np.arange(300), 300 + np.arange(300), np.full(100, 700)]
    prefix = np.r_[np.arange(300), np.arange(300), np.full(100, 900)]
    values = np.repeat([0.0, 1.0, 5.0], [300, 300, 100])
    fitted = Buckets(bucket_keys(kinds), hosts(source, prefix), 50, lambda rows: values[rows].mean(keepdims=True))
    found = fitted(bucket_keys(np.array([[0, 0], [4, 0], [8, 0], [8, 3], [2, 0]])))[:, 0]
    both = (300 * 1.0 + 100 * 5.0) / 400
    np.testing.assert_allclose(found, [0.0, 1.0, both, both, values.mean()])
