"""transformers' Trainer and our own training, on the same windows: the same loss, the same step."""

import copy

import numpy as np
import pytest
import torch
from conftest import make_row
from datasets import Dataset
from small_exports import KINDS, small_export, small_gpt, small_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from ping_llm.config import Config, DataConfig, LossConfig, TrainConfig
from ping_llm.data import tokenization as tk
from ping_llm.data.windows import encode_windows, sample_window
from ping_llm.hf.collator import FieldLoss, PingDataCollator
from ping_llm.hf.datasets import _table
from ping_llm.inference.model import PingModel
from ping_llm.training.distributed import Ranks
from ping_llm.training.objective import Objective

WEIGHTS = LossConfig(structure=0.5, src=0.0, dst=0.25, time=2.0, rtt=3.0)
BATCH, TOKENS = 8, 129
KINDS = KINDS | {"coarse": {"field_aware": True, "src_bits_ipv4": 24, "src_bits_ipv6": 48}}


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    """(8, 129), with muted tokens; two are mostly padding."""
    config, rng = DataConfig(shifted_pairs=0.5), np.random.default_rng(0)
    rows = [make_row(3 if i in (2, 5) else 200, seed=i) for i in range(BATCH)]
    drawn = encode_windows([sample_window(row, config, TOKENS, rng) for row in rows], TOKENS)
    assert (drawn <= tk.MUTED).any() and (drawn == tk.PADDING).any()
    return drawn


def arguments(folder, **options) -> TrainingArguments:
    """Plain gradient descent, so that a step shows its gradients."""
    options = {"max_steps": 1, "learning_rate": 0.5, "per_device_train_batch_size": BATCH} | options
    return TrainingArguments(
        str(folder), use_cpu=True, report_to=[], optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0,
        logging_steps=1, save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip


def trained(model, windows, folder, **options) -> Trainer:
    data = Dataset(_table(windows, with_labels=True))
    trainer = Trainer(model, arguments(folder, **options), PingDataCollator.for_model(model), data, eval_dataset=data)
    trainer.train()
    return trainer


def own_step(gpt, windows, loss: LossConfig, rate: float):
    """The loss of our training before a step of gradient descent, and the weights after it."""
    gpt = copy.deepcopy(gpt)
    config = Config(model=gpt.config, loss=loss, train=TrainConfig(batch_size=BATCH, device="cpu", precision="fp32"))
    objective = Objective(config, gpt.train(), Ranks(torch.device("cpu")))
    sums, totals = objective.backward(torch.from_numpy(windows).long())
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter -= rate * parameter.grad
    return objective.means(sums, totals)["loss"], gpt


@pytest.mark.parametrize(
    ("kind", "loss"),
    [*((kind, LossConfig()) for kind in KINDS), ("own", WEIGHTS), ("coarse", LossConfig(smoothing=8.0))],
    ids=[*KINDS, "weights", "smoothing"],
)
def test_a_step_of_trainer_is_a_step_of_ours(kind, loss, windows, tmp_path):
    gpt = small_gpt(**KINDS[kind])
    own_loss, own_after = own_step(gpt, windows, loss, 0.5)
    model = small_model(gpt, loss)
    if loss != LossConfig():  # else that of transformers
        model.loss_function = FieldLoss.for_model(model)
    trainer = trained(model, windows, tmp_path)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(own_loss, rel=1e-5)
    expected = small_model(own_after).state_dict()
    before = small_model(gpt).state_dict()
    moved = max((expected[name] - before[name]).abs().max().item() for name in expected)
    assert moved > 1e-3
    for name, value in trainer.model.state_dict().items():
        assert (value - expected[name]).abs().max() < 1e-3 * moved, name


@pytest.mark.parametrize("accumulated", [2, 4])
def test_a_step_in_several_batches_is_the_same_step(accumulated, windows, tmp_path):
    gpt = small_gpt()
    own_loss, own_after = own_step(gpt, windows, LossConfig(), 0.5)
    for loss_function in (None, FieldLoss(LossConfig())):
        model = small_model(gpt)
        if loss_function:
            model.loss_function = loss_function
        size = BATCH // accumulated
        trainer = trained(
            model, windows, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated
        )
        assert trainer.state.log_history[0]["loss"] == pytest.approx(own_loss, rel=1e-5)
        expected = small_model(own_after).state_dict()
        for name, value in trainer.model.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_an_evaluation_is_the_loss_of_ours(windows, tmp_path):
    gpt = small_gpt()
    own_loss, _ = own_step(gpt, windows, WEIGHTS, 0.0)
    for loss, expected in ((WEIGHTS, own_loss), (None, own_step(gpt, windows, LossConfig(), 0.0)[0])):
        model = small_model(gpt)
        if loss:
            model.loss_function = FieldLoss(loss)
        trainer = trained(model, windows, tmp_path, learning_rate=0.0, per_device_eval_batch_size=BATCH)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_weighted_step_in_several_batches_is_nearly_the_same(windows, tmp_path):
    gpt = small_gpt()
    own_loss, _ = own_step(gpt, windows, WEIGHTS, 0.5)
    model = small_model(gpt, WEIGHTS)
    model.loss_function = FieldLoss.for_model(model)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    loss = trained(model, windows, tmp_path, **options).state.log_history[0]["loss"]
    assert loss == pytest.approx(own_loss, rel=0.02)


def test_a_model_that_is_no_export_has_no_loss_of_a_run():
    model = small_model(small_gpt())
    model.config.ping_llm = None
    with pytest.raises(ValueError, match="it is none of ping-llm export"):
        FieldLoss.for_model(model)


def test_batches_by_hand():
    collator = PingDataCollator(src_bytes=(3, 6))
    batch = collator([
        {"input_ids": [0, 1, 203, 11, 13, 12, 10], "labels": [0, 1, 203, 11, 13, 12, -100]},
        {"input_ids": torch.tensor([0, 10, 0]), "labels": torch.tensor([0, 10, 0])},
    ])  # fmt: skip
    assert batch["input_ids"].tolist() == [[0, 1, 203, 11, 13, 11], [0, 10, 0, 9, 9, 9]]  # the last byte is not shown
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[0, 1, 203, 11, 13, 11], [0, 10, 0, -100, -100, -100]]
    assert batch["shift_labels"].tolist() == [[1, 203, 11, 13, 11, -100], [10, 0, -100, -100, -100, -100]]


def test_field_weights_by_hand():
    """Even logits cost log 267 wherever they stand; one target of structure, two of dst and one of the RTT are left."""
    logits, targets = torch.zeros(1, 4, 267), torch.tensor([[3, 21, 22, 10]])
    logits[0, 3, 10] = 5.0
    cheap = -torch.log_softmax(logits[0, 3], -1)[10].item()
    even, loss = float(np.log(267)), FieldLoss(LossConfig(structure=2, src=1, dst=0.5, time=1, rtt=4))
    expected = (2 * even + 2 * 0.5 * even + 4 * cheap) / (2 + 2 * 0.5 + 4)
    assert loss(logits, targets, shift_labels=targets).item() == pytest.approx(expected, rel=1e-6)
    shifted = torch.tensor([[0, 3, 21, 22]])  # the same without `shift_labels`: the last is not known
    expected = (2 * even + 2 * 0.5 * even) / (2 + 2 * 0.5)
    assert loss(logits, shifted).item() == pytest.approx(expected, rel=1e-6)
    halved = loss(logits, targets, num_items_in_batch=torch.tensor(8), shift_labels=targets)
    assert halved.item() == pytest.approx(loss(logits, targets, shift_labels=targets).item() / 2, rel=1e-6)


@pytest.mark.parametrize("kind", ["nanochat", "own"])
def test_an_exported_folder_learns_and_what_is_saved_loads_everywhere(kind, windows, tmp_path):
    folder = small_export(tmp_path / "model", small_gpt(**KINDS[kind]))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    data = Dataset(_table(windows, with_labels=True))
    options = arguments(tmp_path / "out", max_steps=30, learning_rate=0.05)
    trainer = Trainer(model, options, PingDataCollator.for_model(model), data, processing_class=tokenizer)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    trainer.save_model(tmp_path / "tuned")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", trust_remote_code=True).eval()
    assert type(AutoTokenizer.from_pretrained(tmp_path / "tuned", trust_remote_code=True)) is type(tokenizer)
    ids = torch.tensor([tokenizer.encode("src=192.0.2.1 dst=198.51.100.7 rtt=")])
    with torch.inference_mode():
        own = PingModel.load(tmp_path / "tuned", device="cpu").gpt(ids)
        assert torch.allclose(own, tuned(ids).logits, atol=1e-4)
        assert not torch.allclose(own, PingModel.load(folder, device="cpu").gpt(ids), atol=1e-2)
