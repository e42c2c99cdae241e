"""Baselines on RTT matrices of which 30 % is observed: on public ones they reach what the literature reports, on made-up
ones nearly the least error there is.

The matrices (Zhu et al., IEEE/ACM ToN 2017, github.com/uofa-rzhu3/NetLatency-Data) lie beside the checkout, not in it.
"""

import gzip
from pathlib import Path

import numpy as np
import pytest

from ping_llm.eval.baselines.coordinates import Coordinates, Vivaldi
from ping_llm.eval.baselines.factors import DMFSGD
from ping_llm.eval.baselines.neighbours import ProfileNeighbours
from ping_llm.eval.columns import Measurements, Queries

MATRICES = Path(__file__).resolve().parents[3] / "shared" / "data" / "matrices"
OBSERVED, NOISE = 0.3, 0.01
NOISE_FLOOR = 0.674 * NOISE
"""Median relative error of the true RTT where noise is normal with deviation NOISE in log-RTT."""


def measured(source, destination, rtt_ms, hosts: int, one_host: bool) -> Measurements:
    """One ping a pair; with `one_host` source i and destination i have the same address."""
    destination = destination + (0 if one_host else hosts)
    address = np.arange(2 * hosts)
    packed = np.zeros((len(address), 16), dtype=np.uint8)
    packed[:, 10:12], packed[:, 12], packed[:, 13], packed[:, 15] = 255, 1 + address // 250, address % 250, 1
    zero = np.zeros(len(source), dtype=np.int64)
    return Measurements(
        *(source.astype(np.int32), destination.astype(np.int32), source.astype(np.int64), zero),
        *(rtt_ms.astype(np.float32), zero.astype(np.uint8), zero.astype(np.int8), packed, ("train",)),
    )


def relative_error(matrix, learn, one_host: bool = True, both_ways: bool = True, seed: int = 0) -> tuple[float, float]:
    """Median and p90 over the pairs of a symmetric matrix in ms that were not observed, in both directions."""
    rng = np.random.default_rng(seed)
    low, high = np.triu_indices(len(matrix), 1)
    known = rng.random(len(low)) < OBSERVED
    flip = rng.random(len(low)) < 0.5
    source, destination = np.where(flip, high, low), np.where(flip, low, high)
    hidden = (
        np.concatenate([source[~known], destination[~known]]),
        np.concatenate([destination[~known], source[~known]]),
    )
    source, destination = source[known], destination[known]
    if both_ways:
        source, destination = np.concatenate([source, destination]), np.concatenate([destination, source])
    rtt_ms = matrix[source, destination]
    learned = learn(measured(source, destination, rtt_ms, len(matrix), one_host))
    table = measured(*hidden, np.ones(len(hidden[0])), len(matrix), one_host)
    queries = Queries(table, np.arange(len(table)), np.zeros((len(table), 0), dtype=np.int64))
    error = np.abs(np.exp(learned(queries.view())) / matrix[hidden] - 1)
    return float(np.median(error)), float(np.quantile(error, 0.9))


def planet_lab(frame: int) -> np.ndarray:
    """(490, 490) RTTs in ms."""
    path = MATRICES / f"PlanetLabData_{frame}.txt.gz"
    if not path.exists():
        pytest.skip(f"no {path}: the public RTT matrices are not beside this checkout")
    with gzip.open(path, "rt") as file:
        return np.loadtxt(file)


@pytest.mark.parametrize(
    ("learn", "median", "p90"),
    [
        (lambda train: Vivaldi(train, 4), 0.080, 0.35),
        (lambda train: DMFSGD(train, 10), 0.042, 0.22),
    ],
    ids=["vivaldi_4d", "dmfsgd_10"],
)
def test_planet_lab_errors_are_within_a_tenth_of_the_reference(learn, median, p90):
    found = relative_error(planet_lab(1), learn)
    assert found == (pytest.approx(median, rel=0.1), pytest.approx(p90, rel=0.1))


@pytest.mark.parametrize("one_host", [True, False], ids=["hosts", "bipartite"])
def test_planet_lab_errors_hold_in_the_last_frame_and_for_sources_and_destinations_apart(one_host):
    found = relative_error(planet_lab(18), lambda train: Vivaldi(train, 4), one_host)
    assert found[0] < 1.1 * 0.080 and found[1] < 1.1 * 0.35


def noisy(matrix: np.ndarray, seed: int = 0) -> np.ndarray:
    """The matrix with symmetric noise in log-RTT."""
    noise = np.triu(np.random.default_rng(seed).normal(0, NOISE, matrix.shape), 1)
    return matrix * np.exp(noise + noise.T)


def euclidean(hosts: int = 200) -> np.ndarray:
    """Distances in a space of 4 dimensions, 200 ms a side, plus a height at either end."""
    rng = np.random.default_rng(1)
    position, height = rng.uniform(0, 200, (hosts, 4)), rng.uniform(1, 15, hosts)
    return np.sqrt(((position[:, None] - position) ** 2).sum(axis=-1)) + height[:, None] + height


def low_rank(hosts: int = 200) -> np.ndarray:
    """Symmetric, of rank 6, with non-negative factors."""
    rng = np.random.default_rng(2)
    here, there = rng.gamma(2, 1, (2, hosts, 3))
    return 10 * (here @ there.T + there @ here.T)


@pytest.mark.parametrize(
    ("one_host", "both_ways", "floors"),
    [(True, True, 1.6), (True, False, 1.6), (False, False, 3)],
    ids=["hosts", "hosts_measured_one_way", "sources_and_destinations_measured_one_way"],
)
@pytest.mark.parametrize(
    ("matrix", "learn"),
    [(euclidean, lambda train: Vivaldi(train, 4)), (low_rank, lambda train: DMFSGD(train, 10))],
    ids=["vivaldi_4d", "dmfsgd_10"],
)
def test_made_up_matrices_are_completed_to_a_few_times_the_noise(matrix, learn, one_host, both_ways, floors):
    """One way, sources and destinations apart, only 15 % of the cells are observed."""
    assert relative_error(noisy(matrix()), learn, one_host, both_ways)[0] < floors * NOISE_FLOOR


def test_profile_neighbours_find_hosts_of_the_same_site_on_a_made_up_matrix():
    site = np.arange(200) % 20
    matrix = noisy(euclidean()[np.ix_(site, site)])
    assert relative_error(matrix, lambda train: ProfileNeighbours(train, 5))[0] < 2.5 * NOISE_FLOOR


def test_coordinates_depend_on_the_seed_alone_and_are_symmetric():
    matrix = euclidean(40)
    endpoints = np.stack(np.triu_indices(40, 1))
    first, again, other = (Coordinates(40, 3, seed).fit(endpoints, matrix[tuple(endpoints)], 10) for seed in (0, 0, 1))
    there, back = first.distance_ms(*endpoints), first.distance_ms(*endpoints[::-1])
    np.testing.assert_array_equal(there, again.distance_ms(*endpoints))
    np.testing.assert_allclose(there, back)
    assert not np.allclose(there, other.distance_ms(*endpoints), rtol=1e-3)
