"""Logits and tokens in, cross-entropy of each field out, as sums and counts, to be divided once.

A field is the part of a measurement that a token encodes. The tables that assign roles to fields belong to the
vocabulary and are passed in. The values of RTT bytes are ordered, which cross-entropy does not see: `smoothing_cost` is
what training can add for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ping_llm.config import FIELDS, LossConfig
from ping_llm.model.fields import ROLES, last_place

RTT = FIELDS.index("rtt")
PARTS = (*FIELDS, "rtt1", "rtt2")  # what losses are summed by: the fields, then bytes 1 and 2 of RTTs once more
_VALUES = 256  # of a byte


def token_fields(tokens: Tensor, role_fields: Tensor, byte_fields: Tensor) -> Tensor:
    """Field of each token, (B, T) uint8, for (B, T) tokens whose rows begin with a role.

    `role_fields` (roles,) is the field of a role token itself, `byte_fields` (roles,) that of the bytes that follow it.
    Bytes before any role, and padding, count as structure or as the bytes they follow.
    """
    roles = len(role_fields)
    is_role = (tokens >= 0) & (tokens < roles)
    last = last_place(is_role)
    role = tokens.gather(1, last.clamp(min=0)).clamp(0, roles - 1)
    fields = torch.where(is_role, role_fields[role], byte_fields[role])
    return torch.where(last >= 0, fields, FIELDS.index("structure")).to(torch.uint8)


def part_masks(targets: Tensor, fields: Tensor) -> Tensor:
    """(7, B, T) bool: True where a target is of the part and no padding (−1). FAILED is of the RTT and none of its bytes."""
    numbers = torch.arange(len(FIELDS), device=fields.device)[:, None, None]
    of_field = (fields == numbers) & (targets >= 0)  # (5, B, T)
    is_byte = of_field[RTT] & (targets >= ROLES)  # (B, T)
    follows = F.pad(is_byte[:, :-1], (1, 0))
    return torch.cat([of_field, torch.stack([is_byte & ~follows, is_byte & follows])])


def field_losses(logits: Tensor, targets: Tensor, fields: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy in nats, (7,) fp32, and number of targets, (7,) int64, of each part.

    `logits` is (B, T, V), `targets` (B, T) int64 with −1 = ignored, `fields` (B, T) uint8.
    """
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    masks = part_masks(targets, fields).flatten(1)  # (7, B·T)
    return torch.where(masks, nats, 0.0).sum(dim=1), masks.sum(dim=1)


def field_weights(config: LossConfig) -> Tensor:
    """The weights of the parts, (7,) fp32: bytes 1 and 2 weigh as bytes of the RTT, and nothing once more."""
    weights = [getattr(config, field) for field in FIELDS]
    return torch.tensor([*weights, 0.0, 0.0], dtype=torch.float32)


def smoothing_cost(logits: Tensor, targets: Tensor, fields: Tensor, deviation: float) -> Tensor:
    """What smoothed targets add to the cross-entropy of RTT bytes because values are ordered: the sum over them, () fp32.

    The other arguments are those of `field_losses`. The target is no single 16-bit code but a normal distribution around
    it, whose `deviation`, above 0, is so many codes, cut into codes. The target of byte 1 is its marginal. Byte 2 is read
    after the true byte 1: its target is what lies among the 256 codes that begin so, normalised, and a tail beyond their
    border is in the target of byte 1 alone.
    """
    first, second = part_masks(targets, fields)[len(FIELDS) :]  # (B, T) each
    of_bytes = logits[..., ROLES : ROLES + _VALUES].float()  # (B, T, 256)
    value = (targets - ROLES).clamp(min=0)
    wanted = _smoothed(value, first, second, deviation)
    added = of_bytes.gather(-1, value[..., None])[..., 0] - (wanted * of_bytes).sum(dim=-1)
    return torch.where(first | second, added, 0.0).sum()


def _smoothed(value: Tensor, first: Tensor, second: Tensor, deviation: float) -> Tensor:
    """Targets (B, T, 256) of the RTT bytes with these values, all (B, T): a normal of so many codes, cut at whole values.

    Byte 1 stands at its value plus the part of a step that byte 2 is, or a half where the window ends before that.
    """
    below = (F.pad(value[:, 1:], (0, 1)) + 0.5) / _VALUES
    below = torch.where(F.pad(second[:, 1:], (0, 1)), below, 0.5)
    centre = value + torch.where(first, below, 0.5)
    deviations = torch.where(first, deviation / _VALUES, deviation)
    edges = torch.arange(_VALUES + 1, device=value.device)
    masses = torch.special.ndtr((edges - centre[..., None]) / deviations[..., None]).diff(dim=-1)
    return masses / masses.sum(dim=-1, keepdim=True)


def count_results(targets: Tensor, fields: Tensor) -> Tensor:
    """Number of results, measured or failed, among the targets: the runs of RTT tokens in the rows; () int64."""
    is_rtt = part_masks(targets, fields)[RTT]  # (B, T)
    return is_rtt[:, 0].sum() + (is_rtt[:, 1:] & ~is_rtt[:, :-1]).sum()
