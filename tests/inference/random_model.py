"""A model that learned nothing, whose answers differ nevertheless."""

import torch

from ping_llm.config import ModelConfig
from ping_llm.data import tokenization as tk
from ping_llm.inference.calibration import Calibration
from ping_llm.inference.model import PingModel
from ping_llm.model.gpt import GPT


def random_model(
    width: int,
    seq_len: int,
    knows_bytes: bool = False,
    calibration: Calibration | None = None,
    field_aware: bool = False,
    grammar: bool = False,
) -> PingModel:
    """Of one block in double precision, with the same weights in each call; nothing is left out of its answers.

    One that `knows_bytes` gives no role a chance after RTT_START, as a trained one does, or after a byte; what it says of
    roles among themselves is as random as the rest.
    """
    config = ModelConfig(
        n_layer=1,
        n_embd=width,
        n_head=2,
        seq_len=seq_len,
        field_aware=field_aware,
        prefix_rows=64,
        grammar=grammar,
    )
    gpt = GPT(config).eval().double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.3, generator=generator)
        if knows_bytes:
            gpt.embedding.weight[[tk.RTT_START, *range(tk.BYTE_0, tk.VOCAB_SIZE)], 0] = 6.0 if field_aware else 3.0
            if gpt.fields is not None:
                for weight in (
                    gpt.fields.places.weight[:, 0],
                    gpt.fields.prefixes.weight[:, 0],
                    gpt.fields.values.weight[0],
                ):
                    weight.zero_()
            gpt.head.weight[: tk.BYTE_0, 0], gpt.head.weight[tk.BYTE_0 :, 0] = -3.0, 3.0
            for block in gpt.blocks:  # they leave alone what says so, and do not drown it
                for weight in (block.attention.out.weight, block.mlp.down.weight):
                    weight *= 0.3
                    weight[0] = 0.0
    return PingModel(gpt, torch.device("cpu"), calibration or Calibration(), least_mass=0.0)
