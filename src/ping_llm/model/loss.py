"""Logits and tokens in, cross-entropy of each field out, as sums and counts, to be divided once.

A field is the part of a measurement that a token encodes. The tables that assign roles to fields belong to the
vocabulary and are passed in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ping_llm.config import FIELDS, LossConfig

RTT = FIELDS.index("rtt")


def token_fields(tokens: Tensor, role_fields: Tensor, byte_fields: Tensor) -> Tensor:
    """Field of each token, (B, T) uint8, for (B, T) tokens whose rows begin with a role.

    `role_fields` (roles,) is the field of a role token itself, `byte_fields` (roles,) that of the bytes that follow it.
    Bytes before any role, and padding, count as structure or as the bytes they follow.
    """
    roles = len(role_fields)
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    is_role = (tokens >= 0) & (tokens < roles)
    last = places.masked_fill(~is_role, -1).cummax(dim=1).values  # (B, T) place of the last role, −1 before any
    role = tokens.gather(1, last.clamp(min=0)).clamp(0, roles - 1)
    fields = torch.where(is_role, role_fields[role], byte_fields[role])
    return torch.where(last >= 0, fields, FIELDS.index("structure")).to(torch.uint8)


def field_masks(targets: Tensor, fields: Tensor) -> Tensor:
    """(5, B, T) bool: True where a target is of the field and no padding (−1)."""
    numbers = torch.arange(len(FIELDS), device=fields.device)[:, None, None]
    return (fields == numbers) & (targets >= 0)


def field_losses(logits: Tensor, targets: Tensor, fields: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy in nats, (5,) fp32, and number of targets, (5,) int64, of each field.

    `logits` is (B, T, V), `targets` (B, T) int64 with −1 = ignored, `fields` (B, T) uint8.
    """
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    masks = field_masks(targets, fields).flatten(1)  # (5, B·T)
    return torch.where(masks, nats, 0.0).sum(dim=1), masks.sum(dim=1)


def field_weights(config: LossConfig) -> Tensor:
    """The weights of the fields, (5,) fp32."""
    return torch.tensor([getattr(config, field) for field in FIELDS], dtype=torch.float32)


def count_results(targets: Tensor, fields: Tensor) -> Tensor:
    """Number of results, measured or failed, among the targets: the runs of RTT tokens in the rows; () int64."""
    is_rtt = field_masks(targets, fields)[RTT]  # (B, T)
    return is_rtt[:, 0].sum() + (is_rtt[:, 1:] & ~is_rtt[:, :-1]).sum()
