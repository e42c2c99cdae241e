"""A model is the same one to transformers: its logits, its caches, its losses, loaded in every usual way."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from exports import TINY, random_gpt, random_run, tokens
from switches import ALL, LEFT_OUT, PLAIN, SWITCHES
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    NanoChatForCausalLM,
    NanoChatModel,
    StaticCache,
)

from ping_llm.config import Config, ModelConfig, config_to_dict
from ping_llm.data import tokenization as tk
from ping_llm.hf.configuration import PingGPTConfig
from ping_llm.hf.export import export
from ping_llm.hf.modeling import PingGPTForCausalLM, PingGPTModel, side_by_side
from ping_llm.inference.sources import load
from ping_llm.model.nanochat import is_plain
from ping_llm.model.norm import rms_norm

KINDS = {
    "plain": {},
    "fields": {"field_aware": True, "grammar": True},
    "coarse": {"field_aware": True, "grammar": True, "src_bits_ipv4": 24, "src_bits_ipv6": 48, "bigrams": True},
    "all": ALL | {"field_aware": True, "grammar": True},
}
END, PAD = tk.MEASUREMENT_START, tk.THROUGHPUT_START


def wrapped(**fields) -> PingGPTForCausalLM:
    """Our class around a random model, even where transformers has the architecture."""
    config = replace(PLAIN, **fields)
    model = PingGPTForCausalLM(PingGPTConfig(ping_llm={"config": config_to_dict(Config(model=config))})).eval()
    model.graph.load_state_dict(random_gpt(config).state_dict())
    return model


@pytest.fixture(params=KINDS)
def model(request) -> PingGPTForCausalLM:
    return wrapped(**KINDS[request.param])


@pytest.mark.parametrize(
    "fields",
    [{}, {"n_kv_head": 2}, {"tied_head": True}, {"rope_base": 500.0, "softcap": 5.0}, {"n_embd": 40, **LEFT_OUT}],
    ids=["default", "grouped", "tied", "rotation", "dropout"],
)
def test_a_plain_model_is_nanochat_of_transformers_without_any_code_of_ours(tmp_path, fields):
    run = random_run(tmp_path, **fields)
    folder = export(run, tmp_path / "out")
    assert [file.name for file in folder.glob("*.py")] == ["tokenization_ping_llm.py"]  # of the text, not of the model
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs) is NanoChatForCausalLM and type(AutoModel.from_pretrained(folder)) is NanoChatModel
    given = tokens(3, 100)
    with torch.inference_mode():
        wanted = load(run).gpt(given)
        apart = (theirs(given).logits - wanted).abs().max()
        assert apart <= 1e-4 and wanted.std() > 0.1
        # The sign of the rotation, and the order of rotation and norm: with either changed the answers are others.
        theirs.model.rotary_emb.inv_freq.neg_()
        assert (theirs(given).logits - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("name", SWITCHES)
def test_only_a_model_without_switches_that_nanochat_lacks_is_plain(name):
    of_nanochat = ("n_kv_head", "one_kv_head", "tied_head")
    assert is_plain(replace(PLAIN, **SWITCHES[name])) == (name in of_nanochat)


def test_what_only_learning_feels_leaves_a_model_plain_and_what_reads_tokens_otherwise_does_not():
    assert is_plain(replace(PLAIN, **LEFT_OUT)) and is_plain(replace(PLAIN, prefix_rows=128, lookup_length=3))
    for field in ({"field_aware": True}, {"grammar": True}, {"src_bits_ipv4": 24}, {"src_bits_ipv6": 48}):
        assert not is_plain(replace(PLAIN, **field))


@pytest.mark.parametrize("kind", ["fields", "all"])
def test_a_model_of_ours_is_loaded_by_the_auto_classes(tmp_path, kind):
    run = random_run(tmp_path, **KINDS[kind])
    folder = export(run, tmp_path / "out")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config) is PingGPTConfig and config.graph == load(run).config.model
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (32, 2, 128)
    answers = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    states = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(answers) is PingGPTForCausalLM and type(states) is PingGPTModel
    gpt, given = load(run).gpt, tokens(2, 50)
    with torch.inference_mode():
        assert torch.equal(answers(given).logits, gpt(given))
        assert torch.equal(states(given).last_hidden_state, rms_norm(gpt.states(given)))
    names = [name for name, _ in gpt.named_buffers()]
    assert names and all(torch.equal(answers.graph.get_buffer(name), gpt.get_buffer(name)) for name in names)
    assert answers.generation_config.eos_token_id == END and answers.generation_config.pad_token_id == PAD


@pytest.mark.slow  # starts a process that imports transformers
def test_a_fresh_process_without_a_network_loads_all_three(tmp_path):
    folder = export(random_run(tmp_path, **KINDS["fields"]), tmp_path / "out")
    code = (
        "import sys; from transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"
        "for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):\n"
        f"    print(type(auto.from_pretrained({str(folder)!r}, trust_remote_code=True)).__name__)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["PingGPTConfig", "PingGPTModel", "PingGPTForCausalLM"], done.stderr


def test_a_model_that_was_trained_on_is_saved_as_it_was_loaded_and_asked_by_pingmodel(tmp_path):
    run = random_run(tmp_path, **KINDS["fields"])
    trained = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "out"), trust_remote_code=True)
    with torch.no_grad():
        trained.graph.head.weight.add_(0.5)
    trained.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert type(again) is PingGPTForCausalLM and torch.equal(again.graph.head.weight, trained.graph.head.weight)
    found = load(tmp_path / "again")
    assert torch.equal(found.gpt.head.weight, trained.graph.head.weight) and not found.calibration.src_weights
    plain = AutoModelForCausalLM.from_pretrained(export(random_run(tmp_path / "plain"), tmp_path / "nanochat"))
    plain.save_pretrained(tmp_path / "nanochat_again")
    assert load(tmp_path / "nanochat_again").config.model == ModelConfig(**TINY)


def test_weights_that_a_folder_lacks_begin_as_gpt_says_and_the_others_stay(tmp_path):
    folder = export(random_run(tmp_path, **KINDS["fields"]), tmp_path / "out")
    whole = PingGPTForCausalLM.from_pretrained(folder)
    weights = {name: weight for name, weight in whole.state_dict().items() if not name.endswith("mlp.up.weight")}
    lacking = PingGPTForCausalLM.from_pretrained(None, config=whole.config, state_dict=weights)
    up = lacking.graph.blocks[0].mlp.up.weight
    assert up.abs().max() <= (3 / 32) ** 0.5 and up.std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert torch.equal(lacking.graph.head.weight, whole.graph.head.weight)


def test_padding_anywhere_changes_nothing_for_the_others(model):
    given, mask = tokens(4, 24), torch.ones(4, 24, dtype=torch.long)
    mask[0, :7], mask[1, 20:], mask[2, 5:9], mask[2, 0] = 0, 0, 0, 0
    with torch.inference_mode():
        found = model(given, attention_mask=mask).logits
        states = model.model(given, attention_mask=mask).last_hidden_state
        for row, own, logits, stream in zip(given, mask.bool(), found, states, strict=True):
            alone = row[own][None]
            torch.testing.assert_close(logits[own], model.graph(alone)[0], atol=1e-4, rtol=1e-4)
            wanted = rms_norm(model.graph.states(alone))[0]
            torch.testing.assert_close(stream[own], wanted, atol=1e-4, rtol=1e-4)


def test_tokens_are_read_side_by_side_and_each_column_knows_its_place():
    given = torch.tensor([[5, 6, 7, 8]])
    read, places = side_by_side(given, torch.tensor([[0, 1, 0, 1]]))
    assert read.tolist() == [[6, 8, -1, -1]] and places.tolist() == [[2, 0, 3, 1]]
    read, places = side_by_side(given, torch.tensor([[1, 1, 1, 0, 1, 1, 1, 0]]))  # of cached tokens and of these
    assert read.tolist() == [[5, 6, 7, -1]] and places is None


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([2, 9, 23])], ids=["last", "some", "named"])
def test_logits_to_keep_are_those_of_all(model, keep):
    given, mask = tokens(3, 24), torch.ones(3, 24, dtype=torch.long)
    mask[0, :7], mask[1, 4:6] = 0, 0
    columns = torch.arange(24)[slice(-keep, None) if isinstance(keep, int) else keep]
    with torch.inference_mode():
        every = model(given, attention_mask=mask).logits
        kept = model(given, attention_mask=mask, logits_to_keep=keep).logits
    assert kept.shape == (3, len(columns), tk.VOCAB_SIZE)
    torch.testing.assert_close(
        kept[mask[:, columns] > 0], every[:, columns][mask[:, columns] > 0], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("beams", [1, 3])
def test_generating_with_a_cache_gives_what_it_gives_without(model, beams):
    given, mask = tokens(3, 16), torch.ones(3, 16, dtype=torch.long)
    mask[0, :5], mask[1, 7] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 24, "num_beams": beams, "do_sample": False}
    options |= {"pad_token_id": PAD, "eos_token_id": None}
    cached, anew = (model.generate(given, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, anew) and cached.shape == (3, 40)
    if beams == 1:
        cache = DynamicCache(config=model.config)
        model(given, attention_mask=mask, past_key_values=cache)
        step = model(cached[:, 16:18], attention_mask=F.pad(mask, (0, 2), value=1), past_key_values=cache).logits
        assert torch.equal(step[:, -1].argmax(-1), cached[:, 18])


def test_a_cache_that_is_cut_repeated_and_selected_goes_on_as_if_it_had_read_that(model):
    given, more = tokens(2, 20), tokens(4, 6)
    cache = DynamicCache()
    with torch.inference_mode():
        model(given, past_key_values=cache)
        cache.crop(-3)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        found = model(more[:2], past_key_values=cache).logits
        wanted = model(torch.cat([given[[1, 0], :17], more[:2]], dim=1)).logits[:, 17:]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_generated_measurement_ends_where_the_next_one_begins():
    model = wrapped(field_aware=True, grammar=True)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, PAD
    given = torch.tensor([[tk.MEASUREMENT_START]])
    for seed in range(5):
        torch.manual_seed(seed)
        out = model.generate(given, do_sample=True, max_new_tokens=60)[0].tolist()
        assert out[-1] == END and END not in out[1:-1]


def test_the_loss_is_the_mean_over_the_labels_of_the_tokens_after(model):
    given = tokens(2, 20)
    labels = given.masked_fill(torch.arange(20) < 4, -100)
    out = model(given, labels=labels)
    nats = F.cross_entropy(out.logits[:, 3:-1].flatten(0, 1), given[:, 4:].flatten(), reduction="none")
    torch.testing.assert_close(out.loss, nats.mean())
    counted = model(given, labels=labels, num_items_in_batch=torch.tensor(64)).loss
    torch.testing.assert_close(counted, nats.sum() / 64)


def test_a_model_leaves_out_values_only_while_it_learns():
    model = wrapped(**LEFT_OUT)
    given = tokens(2, 20)
    whole = model(given).logits
    model.train()
    torch.manual_seed(0)
    first, second = model(given).logits, model(given, logits_to_keep=2).logits
    assert not torch.allclose(first, whole) and not torch.allclose(first[:, -2:], second)
    first.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.testing.assert_close(model.eval()(given).logits, whole)


def test_in_bf16_the_answers_are_close(tmp_path):
    folder = export(random_run(tmp_path, **KINDS["coarse"]), tmp_path / "out", "bf16")
    rounded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    assert rounded.dtype == torch.bfloat16 and exact.dtype == torch.float32
    given = torch.tensor([[0, 8, *range(11, 13)] * 8])  # RTTs, whose features are sines of large numbers
    with torch.inference_mode():
        apart = (rounded(given).logits - exact(given).logits)[exact(given).logits > -100].abs()
    assert 0 < apart.mean() < 0.1 < exact(given).logits.clamp(min=-100).std()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 48)}, "give input_ids"),
        ({"input_ids": torch.zeros(1, 65, dtype=torch.long)}, "65 tokens are more than the 64"),
        ({"attention_mask": torch.ones(1, 1, 2, 2)}, "4 dimensions"),
        ({"output_hidden_states": True}, "output_hidden_states is not given"),
    ],
)
def test_what_has_no_place_is_refused_in_one_line(given, said):
    with pytest.raises(ValueError, match=said):
        wrapped()(**{"input_ids": torch.zeros(1, 2, dtype=torch.long)} | given)


def test_generation_ends_with_one_line_where_the_model_reads_no_further_and_padding_does_not_count():
    model = wrapped(field_aware=True)
    given, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    options = {"do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    with pytest.raises(ValueError, match="65 tokens are more than the 64 that this model reads"):
        model.generate(given, attention_mask=mask, max_new_tokens=6, **options)  # the last one is not read
    mask[:, :20] = 0
    assert model.generate(given, attention_mask=mask, max_new_tokens=20, **options).shape == (2, 80)


def test_a_cache_of_another_kind_or_of_another_model_is_refused():
    model, given = wrapped(), torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="takes a DynamicCache"):
        model(given, past_key_values=StaticCache(config=model.config, max_cache_len=8))
    foreign = DynamicCache()
    foreign.update(torch.zeros(1, 4, 3, 12), torch.zeros(1, 4, 3, 12), 0)
    with pytest.raises(ValueError, match="of another model"):
        model(given, past_key_values=foreign)
