"""Claims about the compiled model, from its graphs alone: nothing here needs a compiler or a GPU."""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_runs import MODEL, make_config, make_windows, run

from ping_llm.config import DataConfig, ModelConfig, OptimConfig
from ping_llm.launch.plan import COMPILED_ACTIVATION_BYTES, EAGER_ACTIVATION_BYTES, activation_bytes
from ping_llm.model.gpt import GPT
from ping_llm.system.hardware import deterministic
from ping_llm.training import objective, trainer
from ping_llm.training.distributed import Ranks
from ping_llm.training.objective import (
    HOPPER_ATTENTION,
    Objective,
    attention_order,
    resolve_compile,
    resolve_compile_optimizer,
)
from ping_llm.training.optimizer import Optimizer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()
    counters.clear()


def test_auto_compiles_on_a_gpu_only():
    devices = CPU, torch.device("cuda")
    assert [[resolve_compile(choice, device) for device in devices] for choice in ("auto", True, False)] == [
        [False, True],
        [True, True],
        [False, False],
    ]


def test_the_optimizer_is_compiled_on_a_gpu_where_the_model_is():
    cuda = torch.device("cuda")
    assert [resolve_compile_optimizer(choice, cuda) for choice in ("auto", True, False)] == [True, True, False]
    assert not any(resolve_compile_optimizer(choice, CPU) for choice in ("auto", True, False))


@pytest.mark.parametrize("world", [1, 3])
def test_a_compiled_optimizer_takes_the_eager_steps_and_rates_that_change_compile_nothing(monkeypatch, world):
    """Two graphs for each of the three shapes of matrices: before and after the exchange of the processes. With three
    processes, of which the others send zeros, this one makes its share of the matrices."""
    counter, compiler = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend=counter, **options))
    courses = []
    for compiled in (False, True):
        model = GPT(MODEL, torch.Generator().manual_seed(0))
        ranks = Ranks(CPU)
        if world > 1:
            gather = lambda mine: torch.cat([torch.zeros_like(mine), mine, torch.zeros_like(mine)])  # noqa: E731
            ranks = types.SimpleNamespace(device=CPU, rank=1, world=world, gather=gather)
        optimizer = Optimizer(model, OptimConfig(), ranks, compiled)
        optimizer.muon.dtype = torch.float32
        for step in range(5):
            for number, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * step + number)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.set_lrs(1 - step / 10)
            optimizer.step(momentum=0.85 + step / 100, weight_decay=0.1 - step / 50)
        courses.append(model.state_dict() | optimizer.state_dict())
    for name, eager in courses[0].items():
        assert (courses[1][name] - eager).norm() <= 1e-6 * eager.norm(), name
    assert counter.frame_count == 2 * 3 and not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2 * 3


def test_a_run_takes_its_steps_with_the_compiled_optimizer_where_that_is_wanted(tmp_path, monkeypatch):
    """On a GPU; here as if this were one. Two graphs for each of the three shapes."""
    counter, compiler = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend=counter, **options))
    for wanted, graphs in ((False, 0), (True, 6)):
        monkeypatch.setattr(trainer, "resolve_compile_optimizer", lambda *_, wanted=wanted: wanted)
        run(make_config(tmp_path / str(wanted), total_steps=2, compile=False))
        assert counter.frame_count == graphs


def test_steps_and_evaluations_are_one_graph_each_whatever_is_left_over(monkeypatch):
    """Micro-batches of 4 windows; 10 windows of val end in a part of 2."""
    counter, compiler = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiler(model, backend=counter, **options))
    monkeypatch.setattr(objective, "attention_order", lambda _: sdpa_kernel(list(HOPPER_ATTENTION), set_priority=True))
    model = GPT(MODEL)
    config = make_config(Path("unused"), compile=True, grad_accum=2, precision="bf16")
    compiled = Objective(config, model, Ranks(CPU))
    for seed in range(2):
        values = compiled.evaluate(make_windows(10, seed))
        compiled.backward(make_windows(8, seed))
    assert counter.frame_count == 2 and not counters["graph_break"]
    eager = Objective(make_config(Path("unused"), precision="bf16"), model, Ranks(CPU))
    assert eager.evaluate(make_windows(10, 1)) == pytest.approx(values, rel=1e-5, nan_ok=True)


def test_the_order_of_attention_is_that_of_a_hopper_and_of_no_other_device(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch._C._get_sdp_priority_order()
    for capability, expected in (
        ((8, 0), before),
        ((10, 0), before),
        ((9, 0), [int(each) for each in HOPPER_ATTENTION]),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        with attention_order(torch.device("cuda")):
            assert torch._C._get_sdp_priority_order()[:4] == expected[:4]
    assert torch._C._get_sdp_priority_order() == before and HOPPER_ATTENTION[0] is SDPBackend.CUDNN_ATTENTION
    with deterministic(True), attention_order(torch.device("cuda")):  # cuDNN's gradients may differ from run to run
        assert torch._C._get_sdp_priority_order()[:3] == [int(each) for each in HOPPER_ATTENTION[1:]]
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    with attention_order(CPU):
        assert torch._C._get_sdp_priority_order() == before


def test_steps_and_evaluations_attend_in_that_order(monkeypatch):
    """Here as if this were a Hopper, and with one that this device cannot take left out."""
    order, model = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], GPT(MODEL)
    monkeypatch.setattr(objective, "attention_order", lambda _: sdpa_kernel(order, set_priority=True))
    seen = []
    with model.blocks[-1].register_forward_pre_hook(lambda *_: seen.append(torch._C._get_sdp_priority_order()[:2])):
        run = Objective(make_config(Path("unused"), grad_accum=2), model, Ranks(CPU))
        run.backward(make_windows(8, 0))
        run.evaluate(make_windows(4, 0))
    assert seen == [[int(each) for each in order]] * 3


def test_a_growing_batch_with_short_windows_stays_compiled(monkeypatch):
    """Two shapes for each of five sizes, and that of evaluations; torch by itself stops at eight."""
    counter, compiler = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend=counter, **options))
    config = make_config(Path("unused"), batch_size=16, compile=True)
    config = dataclasses.replace(config, data=DataConfig(short_windows=2, short_len=46))
    with torch._dynamo.config.patch(recompile_limit=8):
        run = Objective(config, GPT(dataclasses.replace(MODEL, n_layer=1)), Ranks(CPU))
        for size in (1, 2, 4, 8, 16):
            beside = make_windows(2 * size, 1)[:, :47].reshape(size, -1)
            run.backward(torch.cat([make_windows(size, 0), beside], dim=1))
        run.evaluate(make_windows(16, 0))
    assert counter.frame_count == 11


PLAIN = ModelConfig(n_embd=96, n_head=2, seq_len=64)
SWITCHED = dataclasses.replace(PLAIN, n_layer=3, mlp="swiglu", dropout=0.1, lookup_rows=400)


def model_of(config: ModelConfig, fp8: bool) -> GPT:
    model = GPT(config)
    model.learn_in_fp8(fp8)
    return model


def given_to(model: GPT, windows: int) -> dict[str, torch.Tensor]:
    """Windows of 64 tokens, and keys if the model leaves something out."""
    tokens = {"tokens": torch.zeros(windows, 64, dtype=torch.int64)}
    return tokens | ({"keys": torch.arange(windows)} if model.leaves_out else {})


def eager_bytes(config: ModelConfig, windows: int, fp8: bool = False) -> int:
    """Of the tensors that a forward pass keeps for the backward pass, each once."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        return kept.setdefault(tensor.untyped_storage()._cdata, tensor)

    model = model_of(config, fp8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model(**given_to(model, windows))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def compiled_bytes(config: ModelConfig, windows: int, fp8: bool = False) -> int:
    """Of what the backward graph takes in."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    taken = []

    def backward(graph, inputs):
        taken.extend(each.numel() * each.element_size() for each in inputs if isinstance(each, torch.Tensor))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        bw_compiler=backward,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    model = model_of(config, fp8)
    compiled = torch.compile(model, backend=backend, dynamic=False)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings(action="ignore"):
        compiled(**given_to(model, windows)).sum().backward()
    return sum(taken)


@pytest.mark.parametrize(
    ("count", "planned"), [(eager_bytes, EAGER_ACTIVATION_BYTES), (compiled_bytes, COMPILED_ACTIVATION_BYTES)]
)
def test_a_block_keeps_as_many_bytes_of_each_token_and_channel_as_the_plan_counts(count, planned):
    """What another block adds for two more windows of 64 tokens of 96 channels; on a CPU, where the norms of eager steps
    keep fp32 copies as they do under CUDA's autocast."""
    assert added_bytes(count) == pytest.approx(planned, abs=0.75)


@pytest.mark.parametrize("count", [eager_bytes, compiled_bytes])
def test_a_block_keeps_less_in_fp8_than_in_bf16(count):
    assert added_bytes(count, fp8=True) < added_bytes(count) - 4


@pytest.mark.parametrize(("count", "compiled"), [(eager_bytes, False), (compiled_bytes, True)])
def test_switches_keep_as_many_bytes_as_the_plan_counts(count, compiled):
    """Two more windows of a model whose tables take a third of them."""
    expected = 2 * activation_bytes(SWITCHED, compiled)
    assert count(SWITCHED, 4) - count(SWITCHED, 2) == pytest.approx(expected, rel=0.05)


def added_bytes(count: Callable[..., int], **options: bool) -> float:
    two, three = (dataclasses.replace(PLAIN, n_layer=layers) for layers in (2, 3))
    added = (count(three, 4, **options) - count(two, 4, **options)) - (
        count(three, 2, **options) - count(two, 2, **options)
    )
    return added / (2 * 64 * 96)
