"""The path of a measurement is the scaled stream at its tokens, in the two directions in which it varies most."""

import numpy as np
import pytest
from lookable import lookable

from ping_llm.data import tokenization as tk
from ping_llm.inside.hooks import look_inside
from ping_llm.inside.path import measurement_path

B = tk.BYTE_0
FIRST = [tk.MEASUREMENT_START, tk.DST_IPV4, B + 198, tk.SRC_IPV4, B + 192, tk.FAILED]
SECOND = [tk.MEASUREMENT_START, tk.SRC_IPV4, B + 192, tk.RTT_START, B + 100, B + 7, tk.DST_IPV4, B + 203]
WINDOW = np.array([*FIRST, *SECOND, tk.PADDING])


@pytest.mark.parametrize("field_aware", [False, True])
def test_places_are_the_scaled_stream_in_its_first_two_components(field_aware):
    model = lookable(field_aware)
    path = measurement_path(model, WINDOW, 1)
    stream = np.stack([layer.double().numpy()[6:14] for layer in look_inside(model, WINDOW[:-1]).stream])
    points = (stream / np.sqrt((stream**2).mean(axis=-1, keepdims=True))).reshape(-1, 32)
    points -= points.mean(axis=0)
    values, directions = np.linalg.eigh(points.T @ points)
    expected = (points @ directions[:, [-1, -2]]).reshape(3, 8, 2)
    np.testing.assert_allclose(np.abs(path.places), np.abs(expected), atol=1e-4)
    np.testing.assert_allclose(path.shares, values[[-1, -2]] / values.sum(), rtol=1e-4)


def test_tokens_stand_in_their_order_with_their_names_and_fields():
    path = measurement_path(lookable(), WINDOW, 1)
    assert path.names == ["start", "src", "192", "RTT", "100", "7", "dst", "203"]
    assert path.fields == ["structure", "structure", "src", "structure", "rtt", "rtt", "structure", "dst"]
    assert path.earlier == 1 and path.places.shape == (3, 8, 2)


def test_a_measurement_that_is_not_in_the_window_is_refused():
    with pytest.raises(ValueError, match="the window holds 2 measurements, and none is number 2"):
        measurement_path(lookable(), WINDOW, 2)
