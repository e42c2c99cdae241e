"""Claims that hold for every switch of the architecture, and what each one changes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from reference_gpt import plain_logits
from switches import ALL, LEFT_OUT, PLAIN, SWITCHES
from test_model import random_tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ping_llm.config import Config, ModelConfig, OptimConfig, TrainConfig, config_from_dict, config_to_dict
from ping_llm.data import tokenization as tk
from ping_llm.model.block import Mixing
from ping_llm.model.checkpoint import load_model, save, save_config
from ping_llm.model.codewords import lzw
from ping_llm.model.counts import matrices, matrix_parameters
from ping_llm.model.fields import VALUE_FEATURES
from ping_llm.model.gpt import GPT, KVCache, answering_at, flops_per_token, parameter_count
from ping_llm.model.legal import ILLEGAL
from ping_llm.training.optimizer import Optimizer

CASES = SWITCHES | {"left_out": LEFT_OUT, "all": ALL, "all_field_aware": ALL | {"field_aware": True, "grammar": True}}


def awake(**switches) -> GPT:
    """A model in fp64 whose every weight matters."""
    model, generator = GPT(dataclasses.replace(PLAIN, **switches)).eval().double(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    if model.codewords is not None:  # n-grams of the tokens that the tests read
        model.codewords.fill(*lzw([*random_tokens(4, 24).numpy(), *random_tokens(4, 24).numpy()], 380, 4))
    return model


@pytest.fixture(scope="module", params=CASES)
def case(request) -> dict:
    return CASES[request.param]


@pytest.fixture(scope="module")
def model(case) -> GPT:
    return awake(**case)


def test_logits_and_gradients_are_those_of_the_plain_steps(case):
    model = awake(**case | {"grammar": False})
    tokens, slope = random_tokens(2, 24), torch.randn(2, 24, 267, generator=torch.Generator().manual_seed(2)).double()
    expected, logits = plain_logits(model, tokens), model(tokens)
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)  # logits are cast to fp32
    weights = dict(model.named_parameters())
    gradients, plain = (
        torch.autograd.grad(each, list(weights.values()), slope) for each in (logits.double(), expected)
    )
    for name, ours, theirs in zip(weights, gradients, plain, strict=True):
        assert theirs.any(), name
        assert (ours - theirs).norm() < 1e-5 * theirs.norm(), name


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(1, 19), (7, 1, 1, 11)])
def test_cached_pieces_equal_the_whole(model, pieces):
    tokens, cache = random_tokens(2, 20), KVCache()
    logits = torch.cat([model(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padded_prompts_and_their_branches_equal_separate_sequences(model):
    lengths, tokens, cache = [5, 11], random_tokens(2, 24), KVCache()
    prompts = tokens[:, :11].masked_fill(torch.arange(11) >= torch.tensor(lengths)[:, None], -1)
    model(prompts, cache)
    branches = random_tokens(2, 4, 3, seed=4)
    together = model(branches.view(2, 12), cache.fork(), branches=4).view(2, 4, 3, 267)
    then = torch.tensor([[3, -1], [4, 5]])
    after, last = model(then, cache), model(torch.tensor([[7], [8]]), cache.select(torch.tensor([0, 1])))
    for row, length in enumerate(lengths):
        prompt, added = tokens[row, :length], then[row][then[row] >= 0]
        alone = model(torch.cat([prompt.expand(4, -1), branches[row]], dim=1))[:, length:]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)
        line = model(torch.cat([prompt, added, torch.tensor([7 + row])])[None])[0]
        torch.testing.assert_close(after[row, : len(added)], line[length:-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(last[row, 0], line[-1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(6, 9), (2, 10), (0, 1)])
def test_a_cut_cache_goes_on_from_where_it_was_cut(model, lengths):
    """Within whatever field that is; padding that stands between two pieces is not counted."""
    tokens, cache, more = random_tokens(2, 10), KVCache(), random_tokens(2, 4, seed=3)
    for piece in (tokens[:, :4], torch.full((2, 1), -1), tokens[:, 4:]):
        model(piece, cache)
    found, whole = model(more, cache.cut(torch.tensor(lengths))), model(more, cache)
    for row, length in enumerate(lengths):
        line = torch.cat([tokens[row, :length], more[row]])[None]
        torch.testing.assert_close(found[row], model(line)[0, length:], atol=1e-5, rtol=1e-5)
        line = torch.cat([tokens[row], more[row]])[None]
        torch.testing.assert_close(whole[row], model(line)[0, 10:], atol=1e-5, rtol=1e-5)


def test_a_cut_cache_knows_whether_a_time_has_come_up():
    """The first of a window is absolute, and a later one is not: of what was cut off nothing is known."""
    model, cache = awake(grammar=True), KVCache()
    start, absolute, later = tk.MEASUREMENT_START, tk.TIMESTAMP_ABS, tk.TIMESTAMP_DELTA1
    with torch.no_grad():
        model(torch.tensor([[start, absolute]]), cache)
        for length, legal in ((0, absolute), (1, absolute), (2, later)):
            logits = model(torch.tensor([[start]]), cache.cut(torch.tensor([length])))[0, -1]
            assert [token for token in (absolute, later) if logits[token] > ILLEGAL] == [legal]


@torch.no_grad()
def test_answers_at_some_places_are_those_of_all(model):
    tokens, places = random_tokens(2, 20), torch.tensor([[3, 19, 7], [0, 3, 18]])
    whole = model(tokens).gather(1, places[..., None].expand(2, 3, 267))
    torch.testing.assert_close(answering_at(model, places)(tokens), whole, atol=1e-5, rtol=1e-5)
    cache, own = KVCache(), KVCache()
    model(tokens[:, :6], cache)
    model(tokens[:, :6], own)
    at = places.clamp(max=13)
    expected = model(tokens[:, 6:], own).gather(1, at[..., None].expand(2, 3, 267))
    torch.testing.assert_close(answering_at(model, at)(tokens[:, 6:], cache), expected, atol=1e-5, rtol=1e-5)
    for some, all_of_them in ((cache.keys, own.keys), (cache.values, own.values)):
        torch.testing.assert_close(some, all_of_them)


@torch.no_grad()
def test_no_token_sees_a_later_one_and_padding_stays_finite(model):
    tokens = random_tokens(2, 20)
    changed = tokens.clone()
    changed[:, 12] = (tokens[:, 12] + 1) % 267
    assert torch.equal(model(tokens)[:, :12], model(changed)[:, :12])
    cache = KVCache()
    assert model(torch.tensor([[3, 4, 5], [-1, -1, -1]]), cache).isfinite().all()
    assert model(torch.tensor([[-1], [8]]), cache).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_changes_the_answers(name):
    """The same weights, wherever the models have some of one name and shape."""
    plain, model, tokens = awake(), awake(**SWITCHES[name]), random_tokens(1, 20)
    own = model.state_dict()
    model.load_state_dict(own | {k: v for k, v in plain.state_dict().items() if k in own and v.shape == own[k].shape})
    assert (model(tokens) - plain(tokens)).abs().max() > 1e-3


def test_parameters_are_counted_as_the_module_holds_them(case):
    config = dataclasses.replace(PLAIN, **case)
    model = GPT(config)
    padded = (1 if config.tied_head else 2) * (320 - 267) * 48
    assert sum(weight.numel() for weight in model.parameters()) == parameter_count(config) + padded
    muon = Optimizer(model, OptimConfig()).muon.matrices.values()
    assert sum(matrix.weight.numel() for matrix in muon) == matrix_parameters(config)
    shapes = [tuple(matrix.weight.shape) for matrix in muon]
    assert {shape: shapes.count(shape) for shape in shapes} == dict(matrices(config))


def test_flops_are_those_of_the_products_that_training_takes(case):
    """The head's padded rows beside; what the values of RTTs are multiplied by needs no gradient of its input."""
    config, tokens = dataclasses.replace(PLAIN, **case), random_tokens(2, 64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        GPT(config)(tokens).sum().backward()
    expected = flops_per_token(config) + 6 * (320 - 267) * 48 - 2 * VALUE_FEATURES * 48 * config.field_aware
    assert counter.get_total_flops() == 2 * 64 * expected


@pytest.mark.parametrize("learns", [True, False])
def test_the_graph_is_whole(case, learns):
    model = GPT(dataclasses.replace(PLAIN, **case))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    options = {"keys": torch.tensor([5, 6])} if learns and model.leaves_out else {}
    with torch.set_grad_enabled(learns), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(tokens := random_tokens(2, 64), **options), model(tokens, **options))


def test_every_weight_moves_and_a_restored_optimizer_goes_on(case):
    """Matrices by Muon, tables and vectors by AdamW."""
    first, second = (awake(**case).float() for _ in range(2))
    optimizers = [Optimizer(model, OptimConfig()) for model in (first, second)]
    for step in range(3):
        if step == 2:
            second.load_state_dict(first.state_dict())
            optimizers[1].load_state_dict({name: value.clone() for name, value in optimizers[0].state_dict().items()})
        for number in range(2) if step == 2 else range(1):
            model = (first, second)[number]
            model(random_tokens(2, 24, seed=step)).square().sum().backward()
            before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
            optimizers[number].step(0.9, 0.1)
            model.zero_grad()
            assert all(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


@torch.no_grad()
def test_a_checkpoint_gives_the_same_logits(case, tmp_path):
    config = Config(model=dataclasses.replace(PLAIN, **case), train=TrainConfig(run_dir=tmp_path))
    model = awake(**case).float()
    save_config(tmp_path, config)
    save(tmp_path, 1, {name: value.clone() for name, value in model.state_dict().items()}, {}, {"val_loss": 1.0})
    loaded, read, _ = load_model(tmp_path)
    assert read == config and torch.equal(loaded(tokens := random_tokens(2, 20)), model(tokens))


def test_a_config_from_before_the_switches_is_that_of_a_plain_model():
    """And the plain model has the weights it had."""
    values = config_to_dict(Config(model=PLAIN))
    before = {"n_layer", "n_embd", "n_head", "seq_len", "rope_base", "softcap", "field_aware", "prefix_rows"}
    values["model"] = {name: value for name, value in values["model"].items() if name in before}
    assert config_from_dict(values, "config.json").model == PLAIN
    names = {"embedding.weight", "head.weight"} | {
        f"blocks.{layer}.{name}.weight"
        for layer in range(3)
        for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    }
    assert set(GPT(PLAIN).state_dict()) == names


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"n_kv_head": 3}, "model.n_head=4 must be a multiple of model.n_kv_head=3"),
        ({"lookup_rows": 267}, "model.lookup_rows=267 must be 0 or above 267"),
        ({"n_layer": 1, "unet_skips": True}, "model.unet_skips needs a model.n_layer of at least 2"),
    ],
)
def test_what_excludes_each_other_is_said_at_once(switches, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        dataclasses.replace(PLAIN, **switches)


def test_swiglu_has_as_many_weights_as_tiles_of_16_allow():
    """8/3 of the width inside: 426.7 of 160, 1,706.7 of 640, 4,096 of 1,536."""
    for width, inner in ((160, 432), (640, 1712), (1536, 4096)):
        config = ModelConfig(n_embd=width, n_head=4, mlp="swiglu")
        assert config.mlp_width == inner
        plain = parameter_count(dataclasses.replace(config, mlp="relu2"))
        assert parameter_count(config) == pytest.approx(plain, rel=0.01)


@torch.no_grad()
def test_a_tied_model_knows_nothing_at_first_and_its_head_is_its_embedding():
    for fields in (False, True):
        model, tokens = GPT(dataclasses.replace(PLAIN, tied_head=True, field_aware=fields)), random_tokens(4, 65)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        assert loss.item() == pytest.approx(math.log(267), abs=0.01)
    before, only = model.logits(torch.ones(1, 48)), torch.arange(267) == 99
    model.embedding.weight[99] += 1
    assert torch.equal((model.logits(torch.ones(1, 48)) != before)[0], only)


@torch.no_grad()
def test_scalars_begin_as_if_there_were_none():
    plain = GPT(PLAIN, torch.Generator().manual_seed(0))
    mixed = GPT(dataclasses.replace(PLAIN, residual_scalars=True, x0_scalars=True), torch.Generator().manual_seed(0))
    for model in (plain, mixed):
        model.blocks[0].attention.out.weight.fill_(0.1)
    assert torch.equal(plain(tokens := random_tokens(2, 20)), mixed(tokens))
    assert mixed.mixing.residual.tolist() == [1, 1, 1] and mixed.mixing.x0.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("layers", "pairs"), [(2, {1: 0}), (5, {3: 1, 4: 0}), (4, {2: 1, 3: 0})])
def test_each_block_of_the_second_half_sees_its_mirror_image(layers, pairs):
    """The middle one of an odd number is its own."""
    mixing = Mixing(dataclasses.replace(PLAIN, n_layer=layers, unet_skips=True))
    mixing.init_weights()
    assert mixing.skips.tolist() == [1] * (layers // 2)
    earlier = [torch.tensor(10.0**number) for number in range(mixing.kept)]
    for layer in range(layers):
        added = 10 ** pairs[layer] if layer in pairs else 0
        assert mixing(layer, torch.tensor(0.5), torch.tensor(7.0), earlier[:layer]) == 0.5 + added


@torch.no_grad()
def test_a_pair_of_tokens_has_a_row_of_its_own():
    model, tokens = GPT(dataclasses.replace(PLAIN, bigrams=True)), torch.tensor([[3, 14, 15, 3, 14, 14, 3]])
    assert model.bigrams.weight.shape == (71_289, 48) and not model.bigrams.weight.any()
    before = model.states(tokens)
    model.bigrams.weight[3 * 267 + 14] = 2.0
    assert (model.states(tokens) != before).any(-1).tolist() == [[False, True, False, False, True, False, False]]


def test_every_other_block_embeds_values_the_last_among_them():
    for layers, expected in ((4, [False, True, False, True]), (3, [True, False, True]), (1, [True])):
        model = GPT(dataclasses.replace(PLAIN, n_layer=layers, value_embeddings=True))
        assert [block.attention.value is not None for block in model.blocks] == expected
        assert not model.blocks[-1].attention.value.gate.weight.any()


@torch.no_grad()
def test_without_positions_only_what_came_first_matters():
    """Two blocks would see an order through what the earlier tokens saw; the last of one block sees a set."""
    model, tokens = GPT(dataclasses.replace(PLAIN, n_layer=1, positions="none")), random_tokens(1, 12)
    model.blocks[0].attention.out.weight.normal_()
    model.head.weight.normal_()
    shuffled = torch.cat(
        [tokens[:, torch.randperm(11, generator=torch.Generator().manual_seed(0))], tokens[:, 11:]], dim=1
    )
    torch.testing.assert_close(model(tokens)[:, -1], model(shuffled)[:, -1], atol=1e-4, rtol=1e-4)


def test_heads_of_odd_width_need_no_rotary_positions():
    with pytest.raises(ValueError, match=r"n_head = 7 must be even for rotary positions"):
        ModelConfig(n_embd=35, n_head=5)
    assert GPT(ModelConfig(n_embd=35, n_head=5, positions="learned"))(random_tokens(1, 4)).shape == (1, 4, 267)


def test_fp8_multiplies_whole_tiles_of_shared_heads():
    model, train = ModelConfig(n_embd=144, n_head=6, n_kv_head=1), TrainConfig(precision="fp8")
    with pytest.raises(ValueError, match=r"^train.precision=fp8 needs heads of keys and values .* 16 wide .*, not 24:"):
        Config(model=model, train=train)
    assert Config(model=dataclasses.replace(model, n_kv_head=2), train=train)
