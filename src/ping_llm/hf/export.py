"""A trained model in, a folder that transformers, the Hugging Face hub and PingModel load out.

A plain model becomes one of transformers' own architecture `nanochat`, any other one of our classes. What the folder says is
read back and compared with the model before the folder gets its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig, NanoChatConfig, NanoChatForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ping_llm.config import config_to_dict
from ping_llm.data import tokenization as tk
from ping_llm.data.rows import manifest_sha256
from ping_llm.hf.card import Weights, model_card
from ping_llm.hf.configuration import PingGPTConfig
from ping_llm.hf.modeling import PingGPTForCausalLM
from ping_llm.hf.tokenization import PingTokenizer
from ping_llm.inference.calibration import Calibration
from ping_llm.inference.sources import CONFIG_KEY, EXPORT_NAME, EXPORT_VERSION, Loaded, Source, load, read_weights
from ping_llm.model.checkpoint import MODEL_NAME
from ping_llm.model.gpt import GPT
from ping_llm.model.nanochat import is_plain, to_nanochat
from ping_llm.system.files import file_sha256, try_new_folder, whole_folder, write_atomically

CARD_NAME = "README.md"
MEASUREMENT_TOKENS = 47  # of one between IPv6 addresses with a time, at most
TOLERANCE = 1e-4  # of logits, fp32
FITTED = "The calibration was fitted to these weights."
ROUNDED = "The calibration was fitted to the fp32 weights that these are rounded from."
NOT_CALIBRATED = "There is no calibration: prefix lengths are not weighed and p-values not calibrated."
Dtype = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ONE_FILE = "1000TB"  # weights are never dealt to several files: PingModel reads one
_KEPT = ("step", "val_loss", "rows_sha256", "tokens")  # of a run's state
_TRIED = (2, 48)  # windows and tokens that are compared


def export(
    source: Source,
    to: Path,
    dtype: Dtype = "fp32",
    rows: Path | None = None,
    results: Path | None = None,
    licence: str = "",
    address: str = "",
) -> Path:
    """Writes the model of a run, or of an earlier export, into the folder `to`, which is new; it is whole or not there.

    In fp32 it answers as the run does, to the bit. In bf16 weights are rounded: the calibration of the run goes with them,
    and the folder says so, unless `rows` names the rows of the run: then it is fitted to the rounded weights, on val. The
    card says of `rows` what they hold.
    The card names `address`, by default the name of the folder; `results` and `licence`: see `model_card`.
    """
    try_new_folder(to, "--to")
    loaded = load(source)
    if rows is not None and manifest_sha256(rows) != loaded.state.get("rows_sha256"):
        raise ValueError(f"{rows} are not the rows that the run learned from: their val may hold what it has learned")
    with whole_folder(to) as aside, quiet():
        _write(loaded, aside, dtype, rows, results, licence, address or to.absolute().name)
    return to


def _write(
    loaded: Loaded, folder: Path, dtype: Dtype, rows: Path | None, results: Path | None, licence: str, address: str
) -> None:
    model = as_transformers(loaded, dtype)
    model.save_pretrained(folder, max_shard_size=_ONE_FILE)
    (folder / MODEL_NAME).chmod(0o644)  # as the other files: the format's library keeps it from other users
    nanochat = isinstance(model, NanoChatForCausalLM)
    kept = read_weights(folder, loaded.config, nanochat).eval()
    same = _check(loaded.gpt, kept, type(model).from_pretrained(folder, dtype=torch.float32))
    assert same or dtype != "fp32", "the weights that were written are not those of the run"
    calibration, said = _calibration(loaded, kept, same, rows)
    sha256 = file_sha256(folder / MODEL_NAME)
    if calibration != Calibration():
        dataclasses.replace(calibration, model_sha256=sha256).save(folder)
    about = {"format_version": EXPORT_VERSION, "sha256": sha256, "dtype": dtype, "calibration": said}
    write_atomically(folder / EXPORT_NAME, json.dumps(about, indent=1) + "\n")
    PingTokenizer(model_max_length=loaded.config.model.seq_len).save_pretrained(folder)
    told = dataclasses.replace(loaded, calibration=calibration)
    write_atomically(
        folder / CARD_NAME, model_card(told, Weights(dtype, said, nanochat), address, results, licence, rows)
    )


def as_transformers(loaded: Loaded, dtype: Dtype = "fp32") -> PreTrainedModel:
    """The model as one of transformers, with weights in that precision; it generates until a measurement ends."""
    shape, weights = loaded.config.model, loaded.gpt.state_dict()
    kind: type[PreTrainedModel] = PingGPTForCausalLM
    config: PreTrainedConfig = PingGPTConfig(ping_llm=_about(loaded))
    if is_plain(shape):
        kind, config, weights = NanoChatForCausalLM, _nanochat_config(loaded), to_nanochat(weights, shape)
    else:
        weights = {f"model.gpt.{name}": weight for name, weight in weights.items()}
    model = kind.from_pretrained(None, config=config, state_dict=weights, dtype=_DTYPES[dtype])
    end = tk.MEASUREMENT_START  # of the next one
    model.generation_config = GenerationConfig(
        bos_token_id=end, eos_token_id=end, pad_token_id=config.pad_token_id, max_new_tokens=MEASUREMENT_TOKENS
    )
    return model


def _nanochat_config(loaded: Loaded) -> NanoChatConfig:
    shape = loaded.config.model
    config = NanoChatConfig(
        vocab_size=tk.VOCAB_SIZE,
        hidden_size=shape.n_embd,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.seq_len,
        rms_norm_eps=torch.finfo(torch.float32).eps,  # that of torch's own rms_norm
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_base},
        final_logit_softcapping=shape.softcap,
        tie_word_embeddings=shape.tied_head,
        bos_token_id=tk.MEASUREMENT_START,
        eos_token_id=tk.MEASUREMENT_START,
        pad_token_id=tk.THROUGHPUT_START,  # no measurement holds it, and its row of the embedding does not learn
    )
    setattr(config, CONFIG_KEY, _about(loaded))
    return config


def _about(loaded: Loaded) -> dict[str, Any]:
    """The entry of config.json by which PingModel knows the model; without the paths of the machine that trained it."""
    values = config_to_dict(loaded.config)
    del values["data"]["rows"], values["train"]["run_dir"], values["train"]["wandb_project"]
    del values["data"]["replay"], values["data"]["replay_share"]  # of a fine-tuned run, as the next
    del values["train"]["init_from"], values["optim"]["lora_rank"]
    state = {name: loaded.state[name] for name in _KEPT if name in loaded.state}
    return {"format_version": EXPORT_VERSION, "config": values, "state": state}


@torch.inference_mode()
def _check(gpt: GPT, kept: GPT, model: PreTrainedModel) -> bool:
    """Whether what was written answers to the bit as the model does; AssertionError if it is another to transformers."""
    tokens = torch.randint(0, tk.VOCAB_SIZE, _TRIED, generator=torch.Generator().manual_seed(0))
    wanted, found = kept(tokens), model.eval()(tokens).logits
    apart = (wanted - found).abs().max().item()
    assert apart <= TOLERANCE, f"transformers answers with logits that are {apart:.2g} away"
    return torch.equal(gpt(tokens), wanted)


def _calibration(loaded: Loaded, kept: GPT, same: bool, rows: Path | None) -> tuple[Calibration, str]:
    """The calibration of an export whose weights are the `same` or rounded, and what it says of it."""
    if rows is not None and not (same and loaded.calibration != Calibration()):
        from ping_llm.training.calibration import calibrate

        config = dataclasses.replace(loaded.config, data=dataclasses.replace(loaded.config.data, rows=rows))
        return calibrate(kept, config, torch.device("cpu")), FITTED
    if loaded.calibration == Calibration():
        return loaded.calibration, NOT_CALIBRATED
    told = loaded.folder / EXPORT_NAME  # of an export that is exported again
    before = json.loads(told.read_bytes())["calibration"] if told.is_file() else FITTED
    return loaded.calibration, before if same else ROUNDED


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and hints of transformers."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
