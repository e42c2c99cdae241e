"""The claim that peft changes an exported model as any of transformers."""

from __future__ import annotations

import pytest
import torch
from small_exports import KINDS, small_export, small_gpt
from transformers import AutoModelForCausalLM

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("kind", KINDS)
def test_lora_of_peft_attaches_to_an_exported_model_and_merges_into_it(tmp_path, kind):
    folder = small_export(tmp_path, small_gpt(**KINDS[kind]))
    network = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = torch.tensor([[0, 1, 203, 11, 13, 18, 3, 209, 62, 111, 18, 8]])
    before = network(tokens).logits.detach()
    tuned = peft.get_peft_model(network, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.testing.assert_close(tuned(tokens).logits, before)  # it begins as the model
    learning = {name: weight for name, weight in tuned.named_parameters() if weight.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    optimizer = torch.optim.SGD(learning.values(), lr=10.0)
    tuned(tokens, labels=tokens).loss.backward()
    assert all(weight.grad is not None for weight in learning.values())
    optimizer.step()
    changed = tuned(tokens).logits.detach()
    assert (changed - before).abs().max() > 0.01
    torch.testing.assert_close(tuned.merge_and_unload()(tokens).logits, changed, rtol=1e-4, atol=1e-4)
