"""Principal components are those of the covariance matrix; what neighbours explain is worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ping_llm.inside.projection import explained_by_neighbours, principal_components, scaled


@given(st.integers(0, 2**32), st.integers(2, 30), st.integers(1, 12))
def test_components_are_eigenvectors_of_the_covariance(seed, n, dimensions):
    points = np.random.default_rng(seed).normal(size=(n, dimensions)) * np.arange(1, dimensions + 1)
    found = principal_components(points)
    values = np.linalg.eigvalsh(np.cov(points.T, bias=True).reshape(dimensions, dimensions))[::-1]
    values = np.pad(values, (0, 1))[:2].clip(min=0)
    np.testing.assert_allclose(found.places.var(axis=0), values, atol=1e-9)
    np.testing.assert_allclose(found.shares, values / points.var(axis=0).sum(), atol=1e-9)
    np.testing.assert_allclose(found.places[:, 0] @ found.places[:, 1], 0, atol=1e-6 * n * dimensions**2)


def test_points_on_a_line_keep_their_distances_and_the_farthest_is_positive():
    found = principal_components(np.array([[1.0, 1.0], [4.0, 5.0], [-2.0, -3.0 - 4.0]]) * [1, 0] + [7, 9])
    assert found.places[:, 0] == pytest.approx([0, 3, -3]) or found.places[:, 0] == pytest.approx([0, -3, 3])
    assert found.places[np.abs(found.places[:, 0]).argmax(), 0] > 0
    assert found.places[:, 1] == pytest.approx([0, 0, 0]) and found.shares == pytest.approx([1, 0])


def test_a_sign_does_not_depend_on_that_of_the_axes():
    points = np.random.default_rng(0).normal(size=(9, 4))
    np.testing.assert_allclose(principal_components(points).places, principal_components(points[:, ::-1]).places)
    one = principal_components(points).places
    assert (one[np.abs(one).argmax(axis=0), [0, 1]] > 0).all()


def test_points_that_are_one_have_no_variance():
    found = principal_components(np.ones((3, 5)))
    assert not found.places.any() and not found.shares.any()


def test_vectors_are_scaled_to_a_root_mean_square_of_1():
    found = scaled(np.array([[3.0, 4.0], [-1.0, 1.0]]))
    np.testing.assert_allclose(found, [[0.6 * 2**0.5, 0.8 * 2**0.5], [-1, 1]], rtol=1e-6)


def test_neighbours_explain_what_their_mean_does():
    points = np.array([[0.0], [1.0], [10.0], [11.0]])
    # Each is predicted by its one neighbour: errors 1, 1, 2, 2 over values whose squared deviations sum to 2·26 + 10.
    values = np.array([0.0, 1.0, 8.0, 6.0])
    deviations = ((values - values.mean()) ** 2).sum()
    assert explained_by_neighbours(points, values, 1) == pytest.approx(1 - (1 + 1 + 4 + 4) / deviations)
    assert explained_by_neighbours(points, np.array([0.0, 0.0, 5.0, 5.0]), 1) == 1
    assert explained_by_neighbours(points, np.array([0.0, 5.0, 0.0, 5.0]), 1) < 0


def test_too_few_points_or_equal_values_explain_nothing():
    assert np.isnan(explained_by_neighbours(np.zeros((5, 2)), np.arange(5), 5))
    assert np.isnan(explained_by_neighbours(np.arange(8)[:, None], np.ones(8), 2))
