"""Claims about layers that learn in FP8, against a plain rounding to 8 bits; torch multiplies FP8 on CPUs, too."""

from __future__ import annotations

import math

import pytest
import torch

from ping_llm.model.fp8 import BACKWARD, FORWARD, Linear, quantize

FORMATS = {FORWARD: (3, -6, 448.0), BACKWARD: (2, -14, 57344.0)}  # bits of mantissa, least exponent, largest value

TURNS = (
    lambda t: t,
    lambda t: t.transpose(0, 1),
    lambda t: t[:1].expand(4, 16, -1),
    lambda t: t.flatten(0, 1).t().contiguous().t(),
)
"""Of (4, 16, n): the same in other orders of memory."""


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x, scaled so that its largest value is the format's, to the nearest value of the format, and scaled back; float64."""
    bits, least, most = FORMATS[dtype]
    scale = x.double().abs().max() / most
    exponents = torch.frexp(x.double() / scale).exponent - 1
    steps = 2.0 ** (exponents.clamp(min=least) - bits).double()
    return (x.double() / scale / steps).round() * steps * scale


def products(inputs: torch.Tensor, layer: Linear, slope: torch.Tensor) -> list[torch.Tensor]:
    """What a layer answers, and the gradients of its input and its weight where that of its answer is `slope`."""
    x = inputs.detach().clone().requires_grad_()
    layer.weight.grad = None
    y = layer(x)
    y.backward(slope)
    return [y.detach(), x.grad, layer.weight.grad]


def layer_and_inputs(dtype: torch.dtype) -> tuple[Linear, torch.Tensor, torch.Tensor]:
    layer = Linear(128, 256)
    with torch.no_grad():
        layer.weight.copy_(normal(256, 128, seed=0))
    layer.fp8 = True
    return layer, normal(4, 16, 128, seed=1).to(dtype), (1e-6 * normal(4, 16, 256, seed=2)).to(dtype)


def test_values_are_rounded_as_the_formats_say():
    """The largest of 1, 0.3, −0.01 becomes 448, then 134.4 lies between 128 and 144, and −4.48 next to −4.5. In e5m2 it
    becomes 57,344; 17,203.2 lies between 16,384 and 20,480, and −573.44 between −512 and −640."""
    x = torch.tensor([1.0, 0.3, -0.01])
    for dtype, values, most in ((FORWARD, [448, 128, -4.5], 448), (BACKWARD, [57344, 16384, -512], 57344)):
        x8, scale = quantize(x, dtype)
        assert x8.dtype == dtype and x8.float().tolist() == values and scale.item() == pytest.approx(1 / most)


@pytest.mark.parametrize("dtype", FORMATS)
def test_rounding_equals_the_plain_one_and_does_not_depend_on_the_scale(dtype):
    for scale in (1e-8, 1.0, 1e8):
        x8, factor = quantize(scale * normal(64, 64, seed=3), dtype)
        expected = rounded(scale * normal(64, 64, seed=3), dtype)
        different = (x8.double() * factor.double() - expected).abs() > 1e-6 * scale
        assert different.double().mean() < 1e-3  # what lies in the middle of two values, but for fp32's rounding
        assert (x8.double() * factor.double() - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-3)])
def test_products_are_those_of_rounded_factors_and_the_gradients_of_weights_fp32(dtype, tolerance):
    layer, x, slope = layer_and_inputs(dtype)
    y, of_x, of_weight = products(x, layer, slope)
    x8, weight8 = rounded(x, FORWARD), rounded(layer.weight.detach(), FORWARD)
    slope8 = rounded(slope, BACKWARD)
    for ours, plain, most in (
        (y, x8 @ weight8.T, tolerance),
        (of_x, slope8 @ weight8, tolerance),
        (of_weight, slope8.flatten(0, 1).T @ x8.flatten(0, 1), 1e-4),
    ):
        assert ours.shape == plain.shape and (ours - plain).norm() < most * plain.norm()


@pytest.mark.parametrize("turn", TURNS)
def test_every_product_is_as_a_hopper_takes_it(monkeypatch, turn):
    """The first factor lies by rows, the second by columns, all sides are multiples of 16, the scales one fp32 number each;
    two of e5m2 cannot be multiplied. A CPU would take others, too."""
    taken, multiply = [], torch._scaled_mm

    def checked(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum):
        assert a.is_contiguous() and b.t().is_contiguous() and not any(side % 16 for side in (*a.shape, *b.shape))
        assert all(scale.shape == () and scale.dtype == torch.float32 for scale in (scale_a, scale_b))
        taken.append((a.dtype, b.dtype, use_fast_accum))
        return multiply(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype, use_fast_accum=use_fast_accum)

    monkeypatch.setattr(torch, "_scaled_mm", checked)
    layer, x, slope = layer_and_inputs(torch.bfloat16)
    products(turn(x), layer, turn(slope))
    assert taken == [(FORWARD, FORWARD, True), *2 * [(BACKWARD, FORWARD, False)]]


def test_products_are_as_near_to_those_of_bf16_as_the_bits_of_their_factors_allow():
    """Values between 2^e and 2^(e+1), at 1.44·2^e in the mean, err by 2^(e−n)/√12 where n bits are kept: 2.5 % for three
    bits and 5 % for two. In a product of two factors the squares add up: 3.5 % forward, 5.6 % of gradients."""
    layer, x, slope = layer_and_inputs(torch.bfloat16)
    ours = products(x, layer, slope)
    layer.fp8 = False
    with torch.autocast("cpu", torch.bfloat16):
        theirs = products(x, layer, slope)
    errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(ours, theirs, strict=True)]
    assert errors == pytest.approx([0.035, 0.056, 0.056], rel=0.1)
    assert [each.dtype for each in ours] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_without_gradients_the_weight_is_multiplied_as_it_is():
    layer, x, _ = layer_and_inputs(torch.float32)
    with torch.no_grad():
        plain = layer(x)
        assert torch.equal(plain, x @ layer.weight.T)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    assert not torch.equal(layer(x), plain)
    assert layer.weight.dtype == torch.float32 and list(layer.state_dict()) == ["weight"]


def test_a_factor_of_zeros_gives_zeros_and_one_that_is_not_finite_shows():
    layer, x, slope = layer_and_inputs(torch.bfloat16)
    assert all(not each.any() for each in products(torch.zeros_like(x), layer, torch.zeros_like(slope)))
    for value in (math.nan, math.inf):
        slope[0, 0, 0] = value
        _, of_x, of_weight = products(x, layer, slope)
        assert not of_x.isfinite().any() and not of_weight.isfinite().any()


@pytest.mark.parametrize("turn", TURNS)
def test_inputs_and_gradients_may_lie_in_any_order(turn):
    layer, x, slope = layer_and_inputs(torch.float32)
    for given, copied in zip(
        products(turn(x), layer, turn(slope)),
        products(turn(x).contiguous(), layer, turn(slope).contiguous()),
        strict=True,
    ):
        assert torch.equal(given, copied)


def test_a_compiled_layer_is_one_graph_with_the_bits_of_the_eager_one():
    torch._dynamo.reset()
    layer, x, slope = layer_and_inputs(torch.bfloat16)
    eager = products(x, layer, slope)
    compiled = torch.compile(layer, backend="aot_eager", dynamic=False, fullgraph=True)
    x.requires_grad_()
    layer.weight.grad = None
    y = compiled(x)
    y.backward(slope)
    assert all(map(torch.equal, eager, (y, x.grad, layer.weight.grad)))
