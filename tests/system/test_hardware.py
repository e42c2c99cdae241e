"""A GPU is told by the whole of its name, and deterministic algorithms are asked for where they can be had."""

from __future__ import annotations

import os

import pytest
import torch

from ping_llm.system.hardware import PEAK_BF16_FLOPS, WITHOUT_FP8, deterministic, gpu_kind, named_peak_flops, native_fp8


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", 165),
        ("h100", 989),
        ("h100-pcie", 756),
        ("rtx_4090", 165),
        ("a100-80gb", 312),
    ],
)
def test_the_peak_is_that_of_the_data_sheet(name, tera):
    assert named_peak_flops(name) == tera * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA L40", "NVIDIA L40G", "NVIDIA A10G", "NVIDIA A10M", "NVIDIA A100X", "NVIDIA A16", "NVIDIA A2", "Tesla T4",
        "Tesla T40", "NVIDIA T400", "NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA B300", "NVIDIA H20", "NVIDIA H800",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4080", "NVIDIA RTX A100", "AMD Instinct MI300X", "",
    ],
)  # fmt: skip
def test_a_gpu_whose_name_only_begins_or_ends_like_one_of_the_table_has_no_peak(name):
    assert named_peak_flops(name) is None


def test_no_two_kinds_of_the_table_are_one():
    assert [gpu_kind(name) for name in PEAK_BF16_FLOPS] == list(PEAK_BF16_FLOPS)


@pytest.mark.parametrize(
    ("capability", "has"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)]
)
def test_fp8_is_of_nvidia_from_ada_on(monkeypatch, capability, has):
    """An A100 is 8.0, an A10 8.6, an L4 8.9, a Hopper 9.0, a B200 10.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert native_fp8(torch.device("cuda")) == has and not native_fp8(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "6.2")  # AMD counts otherwise, and its FP8 is another one
    assert not native_fp8(torch.device("cuda"))
    assert WITHOUT_FP8 == {"A100", "A10"} < PEAK_BF16_FLOPS.keys()


def test_deterministic_algorithms_are_asked_for_inside_alone(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # a warning would not make them so
        with deterministic(False):
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        with pytest.raises(KeyError), deterministic(False):
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_workspace_of_cublas_that_is_not_deterministic_is_refused_and_the_others_are_kept(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic(True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ValueError, match=r"^CUBLAS_WORKSPACE_CONFIG=:0:0 is not deterministic; unset it"):
        deterministic(True).__enter__()
    assert not torch.are_deterministic_algorithms_enabled()
