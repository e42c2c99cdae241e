"""A model that learned nothing, whose answers differ nevertheless."""

import torch

from ping_llm.config import ModelConfig
from ping_llm.inference.model import PingModel
from ping_llm.model.gpt import GPT


def random_model(width: int, seq_len: int) -> PingModel:
    """Of one block in double precision, with the same weights in each call; nothing is left out of its answers."""
    gpt = GPT(ModelConfig(n_layer=1, n_embd=width, n_head=2, seq_len=seq_len)).eval().double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return PingModel(gpt, torch.device("cpu"), least_mass=0.0)
