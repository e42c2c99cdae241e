"""A model with gradients in, a model after one step out: Muon for the block matrices, AdamW for embeddings and head.

Or AdamW for all of them, to see what Muon is worth; or for changes of low rank to given matrices (lora.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ping_llm.config import OptimConfig
from ping_llm.model.gpt import GPT
from ping_llm.training.distributed import Ranks
from ping_llm.training.lora import LowRank
from ping_llm.training.muon import Matrix, Muon

REFERENCE_WIDTH = 768  # AdamW's rates are given for it; wider models take smaller steps
VECTORS_LR_SHARE = 0.02  # of the embedding's rate, of biases and the like; the width is nothing to them
BIGRAMS_LR_SHARE = 0.1  # of the embedding's rate: they begin at 0, and most pairs are rare
LORA_LEARNS = ("matrices", "prefixes")  # groups of a run with LoRA: prefixes it has not met have rows that say nothing
VALUES_LR_SHARE = 0.1  # of the embedding's rate: a matrix that every RTT byte moves, no table of rows


class Optimizer:
    """Both optimisers, or AdamW alone; each parameter of the model is in exactly one group.

    `initial_lrs` holds the peak rate of each group: "matrices", "embedding" (at the head's rate where it is the head, too),
    "head", and in field-aware models "places" and "prefixes", at the embedding's rate, and "values", at a tenth of it. Other
    tables go by their names, at the embedding's rate, or a tenth of it for bigrams. All but the matrices have no weight
    decay, and their rates are scaled by (width / 768)^−½; Muon's step does not depend on the width. Biases and other vectors
    go by their names, at a fiftieth of the embedding's rate, which is not scaled. With `lora_rank` the group of the matrices
    holds their factors, and of the others that of prefixes alone learns. `ranks` are the processes that share the work of a
    step; this one alone by default. `compiled` is of Muon: AdamW is one kernel of torch's for each group, and the
    rate is its argument.
    """

    def __init__(self, model: GPT, config: OptimConfig, ranks: Ranks | None = None, compiled: bool = False) -> None:
        matrices = {
            name: matrix
            for block in model.blocks.named_parameters("blocks")
            if block[0] not in model.tables() | model.vectors()
            for name, matrix in _matrices(*block)
        }
        width_scale = (model.config.n_embd / REFERENCE_WIDTH) ** -0.5
        head_rate = config.head_lr * width_scale
        rate = config.embedding_lr * width_scale if model.head is not None else head_rate
        groups = [{"name": "embedding", "params": [model.embedding.weight], "lr": rate}]
        if model.head is not None:
            groups.append({"name": "head", "params": [model.head.weight], "lr": head_rate})
        self.muon: Muon | None = None
        self.low_rank: LowRank | None = None
        if config.matrices == "muon":
            how = compiled, config.orthogonalization, config.equal_rows
            self.muon = Muon(matrices, config.muon_lr, ranks, *how)
        else:
            whole = {matrix.parameter for matrix in matrices.values()}
            named = {name: p for name, p in model.blocks.named_parameters("blocks") if p in whole}
            rate = config.adamw_lr * width_scale
            if config.lora_rank:
                self.low_rank = LowRank(named, config.lora_rank)
                named = self.low_rank.factors
            groups.append({"name": "matrices", "params": [*named.values()], "names": [*named], "lr": rate})
        if model.fields is not None:
            for name, share in (("places", 1.0), ("prefixes", 1.0), ("values", VALUES_LR_SHARE)):
                weight, rate = getattr(model.fields, name).weight, share * config.embedding_lr * width_scale
                groups.append({"name": name, "params": [weight], "lr": rate})
        for name, table in model.tables().items():
            share = BIGRAMS_LR_SHARE if name == "bigrams.weight" else 1.0
            groups.append({"name": name, "params": [table], "lr": share * config.embedding_lr * width_scale})
        for name, vector in model.vectors().items():
            groups.append({"name": name, "params": [vector], "lr": VECTORS_LR_SHARE * config.embedding_lr})
        if self.low_rank is not None:
            for group in groups:
                if group["name"] not in LORA_LEARNS:
                    for parameter in group["params"]:
                        parameter.requires_grad_(False)
            groups = [group for group in groups if group["name"] in LORA_LEARNS]
        betas = config.adam_beta1, config.adam_beta2
        self.adamw = torch.optim.AdamW(groups, betas=betas, eps=config.adam_eps, weight_decay=0.0, fused=True)
        self.initial_lrs = {"matrices": config.muon_lr} | {g["name"]: g["lr"] for g in self.adamw.param_groups}
        grouped = [
            *dict.fromkeys(matrix.parameter for matrix in matrices.values() if self.muon or self.low_rank),
            *(p for g in self.adamw.param_groups for p in g["params"] if not (self.low_rank and "names" in g)),
        ]
        learning = [p for p in model.parameters() if p.requires_grad]
        assert sorted(map(id, grouped)) == sorted(map(id, learning)), f"{len(grouped)} parameters in groups"

    def set_lrs(self, scale: float) -> None:
        """Sets each group's rate to `scale` times its peak."""
        if self.muon is not None:
            self.muon.lr = self.initial_lrs["matrices"] * scale
        for group in self.adamw.param_groups:
            group["lr"] = self.initial_lrs[group["name"]] * scale

    def step(self, momentum: float, weight_decay: float) -> None:
        """Applies the gradients; the decay is that of the matrices, and the momentum is Muon's."""
        if self.muon is not None:
            self.muon.step(momentum, weight_decay)
        for group in self.adamw.param_groups:
            group["weight_decay"] = weight_decay if group["name"] == "matrices" else 0.0
        if self.low_rank is not None:
            self.low_rank.take_gradients()
        self.adamw.step()
        if self.low_rank is not None:
            self.low_rank.put()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the next step depends on but rates and gradients: flat, tensors only."""
        momenta = self.muon.state_dict() if self.muon is not None else {}
        state = {f"muon.{name}.momentum": momentum for name, momentum in momenta.items()}
        for name, parameter in self._adamw_parameters():
            state |= {f"adamw.{name}.{key}": value for key, value in self.adamw.state[parameter].items()}
        low_rank = self.low_rank.state_dict() if self.low_rank is not None else {}
        return state | {f"lora.{name}": tensor for name, tensor in low_rank.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`, from any device."""
        if self.muon is not None:
            self.muon.load_state_dict({name: state[f"muon.{name}.momentum"] for name in self.muon.matrices})
        if self.low_rank is not None:
            own = {name: tensor for name, tensor in state.items() if name.startswith("lora.")}
            self.low_rank.load_state_dict({name.removeprefix("lora."): tensor for name, tensor in own.items()})
        for name, parameter in self._adamw_parameters():
            prefix = f"adamw.{name}."
            self.adamw.state[parameter] = {
                key.removeprefix(prefix): value.to(parameter.device, copy=True)
                for key, value in state.items()
                if key.startswith(prefix)
            }

    def _adamw_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """AdamW's, by the name of their group, or each by its own in a group of several."""
        for group in self.adamw.param_groups:
            yield from zip(group.get("names", [group["name"]]), group["params"], strict=True)


def _matrices(name: str, parameter: nn.Parameter) -> Iterator[tuple[str, Matrix]]:
    """The matrices that Muon makes orthogonal, each by itself: those of queries, keys and values are three."""
    if not name.endswith(".qkv.weight"):
        yield name, Matrix(parameter)
        return
    rows, queries = parameter.shape
    middle = (rows + queries) // 2  # there are as many rows of keys as of values
    for part, own in zip("qkv", (slice(queries), slice(queries, middle), slice(middle, rows)), strict=True):
        yield name.replace(".qkv.", f".{part}."), Matrix(parameter, own)
