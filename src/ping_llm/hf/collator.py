"""Windows of a dataset in, what transformers' Trainer gives to a model out; and the loss of `ping-llm train` for it.

A window of T + 1 tokens is T inputs and as many targets, as in our own training: a model never reads more than T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ping_llm.config import LossConfig, config_from_dict
from ping_llm.data.tokenization import FIELD_OF_BYTES_AFTER, FIELD_OF_ROLE, PADDING, THROUGHPUT_START
from ping_llm.hf.datasets import IGNORED
from ping_llm.inference.sources import CONFIG_KEY
from ping_llm.model.fields import WHOLE, coarse
from ping_llm.model.loss import field_losses, field_weights, smoothing_cost, token_fields


class PingDataCollator:
    """Pads windows at the right and lays targets beside inputs. Of IPv4 and IPv6 sources, `src_bytes` are shown, others 0.

    Of examples with `input_ids` and perhaps `labels`, −100 where a token is no target, all (T + 1,), it makes `input_ids`,
    `attention_mask`, `labels` and `shift_labels`, all (B, T). `labels` lie beside their own tokens, `shift_labels` are the
    targets: a model that takes both is scored on the last token, too.
    """

    def __init__(self, src_bytes: tuple[int, int] = WHOLE) -> None:
        self.src_bytes = src_bytes

    @classmethod
    def for_model(cls, model: PreTrainedModel) -> PingDataCollator:
        """One that shows as much of sources as the model reads."""
        graph = getattr(model.config, "graph", None)  # none: transformers' own architecture, which reads all
        return cls(WHOLE if graph is None else (graph.src_bits_ipv4 // 8, graph.src_bits_ipv6 // 8))

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch of so many examples, int64."""
        windows = _padded([example["input_ids"] for example in examples])  # (B, T + 1)
        windows = coarse(windows, self.src_bytes)
        targets = windows.masked_fill(windows == PADDING, IGNORED)
        if "labels" in examples[0]:
            targets = targets.masked_fill(_padded([example["labels"] for example in examples]) < 0, IGNORED)
        inputs = windows[:, :-1]
        real = inputs != PADDING
        return {
            "input_ids": inputs.masked_fill(~real, THROUGHPUT_START),
            "attention_mask": real.long(),
            "labels": targets[:, :-1].contiguous(),
            "shift_labels": targets[:, 1:].contiguous(),
        }


class FieldLoss:
    """The loss of `ping-llm train` as the `loss_function` of a model: fields weigh as [loss] of a config says.

    `model.loss_function = FieldLoss.for_model(model)`. Where a step is worked through in several batches, or by several
    processes, targets count as much as each batch has of them, and its own mean weight: only where this differs from batch
    to batch, the loss is not quite that of one large batch.
    """

    def __init__(self, config: LossConfig) -> None:
        self.config, self.weights = config, field_weights(config)
        self.role_fields, self.byte_fields = torch.as_tensor(FIELD_OF_ROLE), torch.as_tensor(FIELD_OF_BYTES_AFTER)

    @classmethod
    def for_model(cls, model: PreTrainedModel) -> FieldLoss:
        """That of the run which an exported model is of; ValueError if the model is not an exported one."""
        about = getattr(model.config, CONFIG_KEY, None)
        if not about:
            raise ValueError(f"the config of this model has no {CONFIG_KEY!r}: it is none of ping-llm export")
        return cls(config_from_dict(about["config"], f"{CONFIG_KEY} of config.json").loss)

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """The weighted mean in nats of logits (B, T, V), () fp32; over `num_items_in_batch` targets, if it is given."""
        if shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        device = logits.device
        targets = shift_labels.to(device).clamp(min=PADDING)
        fields = token_fields(targets, self.role_fields.to(device), self.byte_fields.to(device))
        weights = self.weights.to(device)
        sums, counts = field_losses(logits, targets, fields)
        cost, weight = (weights * sums).sum(), (weights * counts).sum()
        if deviation := self.config.smoothing:  # moves the gradients alone, as in our own training
            more = self.config.rtt * smoothing_cost(logits, targets, fields, deviation)
            cost = cost + more - more.detach()
        if num_items_in_batch is not None:
            weight = weight / (targets >= 0).sum() * num_items_in_batch
        return cost / weight


def _padded(lists: Sequence[Any]) -> Tensor:
    """(B, longest) int64, PADDING at the right."""
    return pad_sequence([torch.as_tensor(each).long() for each in lists], batch_first=True, padding_value=PADDING)
