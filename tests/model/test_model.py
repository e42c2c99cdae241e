"""Claims about the transformer and its key-value cache."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from paths import CONFIGS
from reference_gpt import plain_logits
from torch.overrides import TorchFunctionMode

from ping_llm.config import ModelConfig, load_config
from ping_llm.model.counts import mean_flops_per_token
from ping_llm.model.gpt import GPT, KVCache, flops_per_token, parameter_count

SMALL = ModelConfig(n_layer=2, n_embd=32, n_head=2, seq_len=64)


@pytest.fixture(scope="module", params=["plain", "field_aware"])
def model(request) -> GPT:
    """A model whose every weight matters: zero-initialised ones are filled, and the head speaks up."""
    generator = torch.Generator().manual_seed(1)
    config = dataclasses.replace(SMALL, field_aware=request.param == "field_aware", prefix_rows=1024)
    model = GPT(config, generator=generator).eval()
    with torch.no_grad():
        for block in model.blocks:
            for linear in (block.attention.out, block.mlp.down):
                linear.weight.normal_(std=0.2, generator=generator)
        model.head.weight.normal_(std=0.5, generator=generator)
    return model


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """A fifth of them roles."""
    generator = torch.Generator().manual_seed(seed)
    tokens, roles = (torch.randint(most, shape, generator=generator) for most in (267, 11))
    return torch.where(torch.rand(shape, generator=generator) < 0.2, roles, tokens)


@pytest.mark.parametrize(
    ("name", "plain", "prefixes"), [("tiny", 1_314_240, 15), ("small", 98_645_760, 17), ("full", 680_297_472, 18)]
)
def test_parameter_count_of_each_config(name, plain, prefixes):
    """Beside the transformer 11 roles of 18 places, the prefixes and 28 features of values are vectors of its width; every
    other block of the larger ones has a projection of the embedding, and its gate for each head, of 12 channels."""
    config = load_config(CONFIGS / f"{name}.toml").model
    parameters = plain + (11 * 18 + 2**prefixes + 28) * config.n_embd
    if name != "tiny":
        parameters += config.n_layer // 2 * (config.n_embd**2 + 12 * config.n_head)
    assert parameter_count(config) == parameters
    with torch.device("meta"):
        held = sum(parameter.numel() for parameter in GPT(config).parameters())
    assert held == parameters + 2 * (320 - 267) * config.n_embd


def test_flops_per_token_by_hand():
    # 6·(98,304,000 in blocks + 10·(640² + 12·5) of value embeddings + 170,880 in the head + 28·640 of values), and
    # 12·20·640·1024 of attention
    assert flops_per_token(load_config(CONFIGS / "small.toml").model) == 772_822_800
    # 6·(679,477,248 + 12·(1536² + 12·12) + 410,112 + 28·1536) + 12·24·1536·1024, and
    # 6·(1,228,800 + 42,720 + 28·160) + 12·4·160·256
    assert flops_per_token(load_config(CONFIGS / "full.toml").model) == 4_702_446_720
    assert flops_per_token(load_config(CONFIGS / "tiny.toml").model) == 9_622_080
    assert flops_per_token(ModelConfig(n_layer=4, n_embd=160, n_head=5, seq_len=384)) == 10_578_240


def test_tokens_of_short_windows_attend_to_few_by_hand():
    """Of tiny's 9,622,080 for a token 7,680 are for each of the 256 of its window, so 208 · 7,680 less in windows of 48, of
    which 16 hold three quarters of all tokens."""
    config = load_config(CONFIGS / "tiny.toml")
    assert mean_flops_per_token(config) == 9_622_080
    beside = dataclasses.replace(config, data=dataclasses.replace(config.data, short_windows=16))
    assert mean_flops_per_token(beside) == 9_622_080 - 0.75 * 208 * 7_680


def test_initial_weights_follow_the_table():
    model = GPT(ModelConfig(n_layer=2, n_embd=192, n_head=3, seq_len=64), generator=torch.Generator().manual_seed(0))
    for block in model.blocks:
        assert not block.attention.out.weight.any() and not block.mlp.down.weight.any()
        for linear in (block.attention.qkv, block.mlp.up):
            assert linear.weight.std().item() == pytest.approx(192**-0.5, rel=0.02)
            assert linear.weight.abs().max() <= (3 / 192) ** 0.5
    assert model.embedding.weight.std().item() == pytest.approx(1, rel=0.02)
    assert model.head.weight.std().item() == pytest.approx(0.001, rel=0.02)


def test_untrained_model_knows_nothing():
    tokens = random_tokens(4, 65)
    logits = GPT(SMALL)(tokens[:, :-1])
    assert F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item() == pytest.approx(
        math.log(267), abs=0.01
    )


def test_same_generator_gives_the_same_weights():
    first, second = (GPT(SMALL, generator=torch.Generator().manual_seed(5)).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_logits_are_fp32_of_the_vocabulary_and_softcapped(model):
    with torch.no_grad():
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logits = model(random_tokens(2, 10))
            assert logits.dtype == torch.float32 and logits.shape == (2, 10, 267)
            assert logits.abs().max() <= 15


@torch.no_grad()
def test_bf16_logits_are_near_fp32(model):
    tokens = random_tokens(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(tokens)
    assert (low - model(tokens)).abs().mean() < 0.1


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_logits_and_gradients_are_those_of_the_plain_transformer(model, precision, tolerance):
    tokens, slope = random_tokens(2, 64), torch.randn(2, 64, 267, generator=torch.Generator().manual_seed(2))
    expected = plain_logits(model, tokens)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()), slope)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        logits = model(tokens)
    gradients = torch.autograd.grad(logits, list(model.parameters()), slope)
    assert (logits - expected).norm() < tolerance * expected.norm()
    for name, ours, plain in zip(dict(model.named_parameters()), gradients, expected_gradients, strict=True):
        assert ours.dtype == torch.float32  # sums over many tokens, which bf16 would not hold
        assert (ours - plain).norm() < 3 * tolerance * plain.norm(), name


def test_the_residual_stream_is_of_the_precision_of_the_products(model):
    seen = []
    with model.blocks[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype)):
        for enabled in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                model(random_tokens(1, 8))
    assert seen == [torch.bfloat16, torch.float32]


def test_gradients_of_the_embedding_are_summed_up_in_fp32(model):
    """4,096 times the same token: a sum in bf16 stands still after a few hundred of about the same size."""
    slope, gradients = torch.randn(267, generator=torch.Generator().manual_seed(2)), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            total = (model(torch.full((64, 64), 5)) * slope).sum()
        gradients.append(torch.autograd.grad(total, model.embedding.weight)[0][5])
    exact, low = gradients
    assert (low - exact).norm() < 0.05 * exact.norm()


def test_no_power_is_taken_of_a_token_on_the_way_to_a_gradient(model):
    """Autocast of CUDA takes powers in fp32, `square` among them; that of CPUs does not, so what is called is looked at."""

    class Calls(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            names.add(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    names: set[str] = set()
    with Calls(), torch.autocast("cpu", torch.bfloat16):
        model(random_tokens(1, 8))
    assert "relu" in names and not {"pow", "square", "__pow__", "float_power"} & names


@torch.no_grad()
def test_no_token_sees_a_later_one(model):
    tokens = random_tokens(2, 20)
    changed = tokens.clone()
    changed[:, 12] = (tokens[:, 12] + 1) % 267
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert ((before - after).abs().amax(dim=(0, 2))[12:] > 1e-3).all()  # and every later one sees it


@torch.no_grad()
def test_order_matters_and_only_relative_positions_do(model):
    tokens = random_tokens(1, 20)
    swapped = tokens[:, [1, 0, *range(2, 20)]]
    assert (model(tokens)[:, -1] - model(swapped)[:, -1]).abs().max() > 1e-3
    expected, rotation = model(tokens), model.rotation.clone()
    try:
        model.rotation.copy_(rotation.roll(-30, dims=0))  # the first token stands at position 30
        torch.testing.assert_close(model(tokens), expected, atol=1e-3, rtol=1e-3)
    finally:
        model.rotation.copy_(rotation)


@torch.no_grad()
def test_padding_at_the_right_changes_nothing(model):
    tokens = random_tokens(1, 20)
    padded = torch.cat([tokens, torch.full((1, 9), -1)], dim=1)
    torch.testing.assert_close(model(padded)[:, :20], model(tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(20,), (1, 19), (7, 1, 1, 11), (1,) * 20])
def test_cached_pieces_equal_the_whole(model, pieces):
    tokens, cache = random_tokens(3, 20), KVCache()
    logits = torch.cat([model(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens), atol=1e-4, rtol=1e-4)
    assert cache.size == 20


@torch.no_grad()
def test_prompts_of_unequal_length_share_a_cache(model):
    lengths, tokens = [5, 17, 11], random_tokens(3, 24)
    prompts = tokens[:, :17].clone()
    for row, length in enumerate(lengths):
        prompts[row, length:] = -1
    cache = KVCache()
    prefill = model(prompts, cache)
    assert cache.lengths().tolist() == lengths
    # Two more passes, the first of them padded for one prompt.
    first = torch.tensor([[3, 4], [5, -1], [6, 7]])
    then = torch.tensor([[8], [9], [10]])
    after_first, after_then = model(first, cache), model(then, cache)
    for row, length in enumerate(lengths):
        added = first[row][first[row] >= 0]
        alone = model(torch.cat([tokens[row, :length], added, then[row]])[None])[0]
        torch.testing.assert_close(prefill[row, :length], alone[:length], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            after_first[row, : len(added)], alone[length : length + len(added)], atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(after_then[row, 0], alone[-1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_siblings_equal_separate_sequences(model):
    lengths, siblings = torch.tensor([4, 9]), torch.arange(11, 267)
    prompts = random_tokens(2, 9).masked_fill(torch.arange(9) >= lengths[:, None], -1)
    cache = KVCache()
    model(prompts, cache)
    together = model(siblings.expand(2, 256), cache.fork(), branches=256)
    for row, length in enumerate(lengths.tolist()):
        sequences = torch.cat([prompts[row, :length].expand(256, length), siblings[:, None]], dim=1)
        torch.testing.assert_close(together[row], model(sequences)[:, -1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_branches_of_several_tokens_equal_separate_sequences(model):
    """Also where they go on in the middle of an address or of an RTT."""
    for end in ([1, 20, 30], [8, 60], [3, 5, 6]):
        prompt, branches, cache = torch.tensor([[0, 3, 11, *end]]), random_tokens(1, 5, 3, seed=4), KVCache()
        model(prompt, cache)
        together = model(branches.view(1, 15), cache.fork(), branches=5).view(5, 3, 267)
        alone = model(torch.cat([prompt.expand(5, -1), branches[0]], dim=1))[:, prompt.shape[1] :]
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_fork_leaves_the_cache_as_it_was(model):
    tokens, cache = random_tokens(2, 12), KVCache()
    model(tokens[:, :8], cache)
    keys, size = [key.clone() for key in cache.keys], cache.size
    model(random_tokens(2, 5, seed=9), cache.fork())
    assert cache.size == size and all(map(torch.equal, keys, cache.keys))
    torch.testing.assert_close(model(tokens[:, 8:], cache), model(tokens)[:, 8:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_select_repeats_and_reorders_prompts(model):
    tokens, cache = random_tokens(2, 8), KVCache()
    model(tokens, cache)
    rows, more = torch.tensor([1, 0, 1]), random_tokens(3, 2, seed=3)
    expected = model(torch.cat([tokens[rows], more], dim=1))[:, 8:]
    torch.testing.assert_close(model(more, cache.select(rows)), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_prompt_of_padding_alone_stays_finite(model):
    cache = KVCache()
    assert model(torch.tensor([[3, 4, 5], [-1, -1, -1]]), cache).isfinite().all()
    assert model(torch.tensor([[-1], [8]]), cache).isfinite().all()


@torch.no_grad()
def test_a_start_of_a_measurement_is_a_token_and_no_padding(model):
    """Its number is 0."""
    tokens, cache = torch.tensor([[0, 1, 0, 0], [5, 0, 0, 9]]), KVCache()
    logits = torch.cat([model(piece, cache) for piece in tokens.split((2, 1, 1), dim=1)], dim=1)
    assert cache.valid.all() and cache.lengths().tolist() == [4, 4]
    torch.testing.assert_close(logits, model(tokens), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(63, 1), (1, 63), (60, 2, 2)])
def test_a_cache_reaches_to_the_last_position(model, pieces):
    tokens, cache = random_tokens(2, 64), KVCache()
    logits = torch.cat([model(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens), atol=1e-4, rtol=1e-4)


def test_an_empty_cache_holds_nothing_and_its_forks_neither():
    for cache in (KVCache(), KVCache().fork(), KVCache().select(torch.tensor([0]))):
        assert cache.size == 0 and cache.valid is None and not cache.keys and not cache.values


def test_a_cache_keeps_no_more_than_keys_and_values(model):
    """Else a view would hold the queries, too."""
    cache = KVCache()
    model(random_tokens(2, 8), cache)
    for held in cache.keys + cache.values:
        assert held.is_contiguous() and held.untyped_storage().nbytes() == held.numel() * 4


def test_attention_multiplies_in_the_precision_of_the_products(model, monkeypatch):
    seen, attention = [], F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        seen.append({q.dtype, k.dtype, v.dtype})
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(random_tokens(1, 8))
    assert seen == [{torch.bfloat16}] * 2 + [{torch.float32}] * 2


@pytest.mark.parametrize("field_aware", [False, True])
def test_everything_stays_on_the_device_of_the_tokens(monkeypatch, field_aware):
    """Tensors of the device "meta" have a shape and no values, and no operation takes them together with others."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # which knows no such device
    model, cache = GPT(dataclasses.replace(SMALL, field_aware=field_aware)).to("meta"), KVCache()
    tokens = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    for logits in (
        model(tokens),
        model(tokens, cache),
        model(tokens, cache),
        model(tokens, branches=5),
    ):
        assert logits.device.type == "meta" and logits.shape == (2, 5, 267)
    assert cache.size == 10 and {each.device.type for each in (*cache.keys, cache.valid)} == {"meta"}


def test_the_rotation_is_there_even_where_weights_are_not():
    """A checkpoint brings the weights alone."""
    with torch.device("meta"):
        empty = GPT(SMALL)
    assert empty.head.weight.is_meta and torch.equal(empty.rotation, GPT(SMALL).rotation)
    assert "rotation" not in empty.state_dict() and empty.rotation.dtype == torch.float32


def test_a_rotation_by_hand():
    """Heads of 4: pair 0 turns by the position, pair 1 by a hundredth of it, for base 10,000."""
    rotation = GPT(ModelConfig(n_layer=1, n_embd=8, n_head=2, seq_len=64)).rotation
    for position in (0, 1, 50):
        angles = (position, position / 100)
        expected = [*map(math.cos, angles), *map(math.sin, angles)]
        assert rotation[position].tolist() == pytest.approx(expected, abs=1e-5)


def test_logits_beyond_the_vocabulary_are_not_given():
    model = GPT(SMALL)
    assert model.embedding.weight.shape == model.head.weight.shape == (320, 32)
    assert model(random_tokens(1, 3)).shape == (1, 3, 267)
