"""A device in, what it is and what it could do at best out."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIE": 756e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 FLOP/s of a kind of GPU, from NVIDIA's data sheets."""
WITHOUT_FP8 = {"A100", "A10"}  # of these kinds
FP8_CAPABILITY = 8, 9  # the least of NVIDIA's that multiplies FP8
_SAME_KIND = re.compile(r"NVIDIA|GEFORCE|TESLA|\d+GB|HBM\w*|SXM\d*")  # words of a name that do not change the peak
CUBLAS_WORKSPACES = (":4096:8", ":16:8")  # with any other, cuBLAS may take another algorithm each time


def pick_device(name: str) -> torch.device:
    """The device of that name: cpu, cuda, or auto for cuda where there is one; ValueError if it is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {name!r} must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was requested, but no CUDA device is visible; pass cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def native_bf16(device: torch.device) -> bool:
    """True where the device multiplies bf16 natively; where it emulates it, fp32 is as fast."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def native_fp8(device: torch.device) -> bool:
    """True where the device multiplies FP8 of the kind that NVIDIA's GPUs do, from Ada and Hopper on."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    )


def device_name(device: torch.device) -> str:
    """`NVIDIA H200`, or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    named = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s at best; None if no data sheet gives them."""
    if device.type != "cuda":
        return None
    return named_peak_flops(device_name(device))


def named_peak_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s at best of a GPU of that name; None if no data sheet gives them."""
    return PEAK_BF16_FLOPS.get(gpu_kind(name))


def gpu_kind(name: str) -> str:
    """The kind of a GPU from its name or an abbreviation: "NVIDIA A100-SXM4-80GB" and "a100" are both "A100". What may
    be slower stays another kind, as the part of a GPU ("H100 MIG 1G.10GB"), a laptop's, an L40S beside an L4."""
    words = [word for word in re.split(r"[\s_-]+", name.upper()) if word and not _SAME_KIND.fullmatch(word)]
    kind = " ".join(words)
    with_bus = kind.endswith(" PCIE") and kind not in PEAK_BF16_FLOPS  # of most kinds it changes nothing
    return kind.removesuffix(" PCIE") if with_bus else kind


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Whether torch takes only algorithms that give the same bits each time; on a CPU all of them do.

    To be entered before CUDA multiplies anything. ValueError if the environment has cuBLAS do otherwise.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        given = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
        if given not in CUBLAS_WORKSPACES:
            allowed = " or ".join(CUBLAS_WORKSPACES)
            raise ValueError(f"CUBLAS_WORKSPACE_CONFIG={given} is not deterministic; unset it, or set it to {allowed}")
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def memory_gb(device: torch.device) -> float:
    """Memory of the GPU; or of the machine, or what its control group may take of that."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    limit, memory = Path("/sys/fs/cgroup/memory.max"), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = limit.read_text().strip() if limit.exists() else ""
    return min(memory, int(text) if text.isdecimal() else memory) / 1e9


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this process has held so far: on the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB


def machine_facts(device: torch.device) -> dict[str, str | int | float | None]:
    """What a report says about the machine of a run."""
    return {
        "host": platform.node(),
        "device": device_name(device),
        "peak_flops": peak_flops(device),
        "host_cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
