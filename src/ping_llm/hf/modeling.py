"""Tokens in, what transformers expects of a model out: `GPT` itself, with the masks, caches and outputs usual there.

Padding may stand anywhere: the real tokens of each row are read side by side, as GPT wants them, and what comes out goes
back to their columns. Positions follow from that, so none are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ping_llm.hf.configuration import PingGPTConfig
from ping_llm.hf.held_cache import HeldCache
from ping_llm.model.gpt import GPT, answering_at
from ping_llm.model.norm import rms_norm

Answer = Callable[[Tensor, HeldCache | None, Tensor | None], Tensor]
"""Of tokens (B, T), −1 = padding at the right, a cache, and the place (B, T) of each column among them: what is wanted."""
_NOT_GIVEN = ("output_attentions", "output_hidden_states")


class PingGPTPreTrainedModel(PreTrainedModel):
    """What both classes share; their weights are those of one `GPT`."""

    config_class = PingGPTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]  # noqa: RUF012  as transformers writes it
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    @property
    def graph(self) -> GPT:
        """The model that does the work."""
        return cast(PingGPTModel, self.base_model).gpt

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def initialize_weights(self) -> None:
        """Weights that were not loaded begin as GPT says. Tables that are not saved are made again: loading empties them."""
        self.graph.init_weights()
        with torch.device("meta"):  # no weights; the tables are made anyway
            made = dict(GPT(self.graph.config).named_buffers())
        saved = self.graph.state_dict().keys()
        for name, own in self.graph.named_buffers():
            if name not in saved:
                own.copy_(made[name])

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: transformers would copy this file beside the weights, where its classes would be others."""

    def get_input_embeddings(self) -> nn.Module:
        """The table of tokens. What GPT adds to it follows from the tokens, so embeddings are no input."""
        return self.graph.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Another table of tokens."""
        self.graph.embedding = cast(nn.Embedding, value)

    def _read(
        self,
        answer: Answer,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        past: Cache | None,
        use_cache: bool | None,
        others: dict[str, Any],
    ) -> tuple[Tensor, Cache | None]:
        """What `answer` says of the tokens, and the cache that holds them now; ValueError for what has no place in GPT."""
        if input_ids is None or others.get("inputs_embeds") is not None:
            raise ValueError("give input_ids: what this model makes of a token depends on the field that it is in")
        if refused := [name for name in _NOT_GIVEN if others.get(name)]:
            raise ValueError(f"{refused[0]} is not given by this model; ping-llm inspect-model looks inside")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past is None:
            past = DynamicCache(config=self.config)
        tokens, places = side_by_side(input_ids, attention_mask)
        cache = None if past is None else HeldCache(past, self.config.num_hidden_layers, self.graph.reads_fields)
        self._check_length(tokens, cache)
        out = answer(tokens, cache, places)
        if cache is not None:
            cache.keep(tokens)
        return out, past

    def _check_length(self, tokens: Tensor, cache: HeldCache | None) -> None:
        """ValueError if a row has more tokens, with those held, than positions are known for; padding does not count."""
        held, most = 0 if cache is None else cache.size, self.config.max_position_embeddings
        if held + tokens.shape[1] <= most:
            return
        count = (tokens >= 0).sum(dim=1)
        if cache is not None and held:
            count = count + cache.lengths()
        if (longest := max(int(count.max()), tokens.shape[1])) > most:
            raise ValueError(f"{longest} tokens are more than the {most} that this model reads; give the latest")


class PingGPTModel(PingGPTPreTrainedModel):
    """Tokens in, the normalised residual stream after the last block out."""

    def __init__(self, config: PingGPTConfig) -> None:
        super().__init__(config)
        self.gpt = GPT(config.graph)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`last_hidden_state` is (B, T, D)."""

        def states(tokens: Tensor, cache: HeldCache | None, places: Tensor | None) -> Tensor:
            found = rms_norm(self.gpt.states(tokens, cache))
            return found if places is None else found.gather(1, places[..., None].expand_as(found))

        found, past = self._read(states, input_ids, attention_mask, past_key_values, use_cache, kwargs)
        return BaseModelOutputWithPast(last_hidden_state=found, past_key_values=past)


class PingGPTForCausalLM(PingGPTPreTrainedModel, GenerationMixin):
    """Tokens in, logits of the next one out; illegal ones have none, if the model holds to the grammar."""

    def __init__(self, config: PingGPTConfig) -> None:
        super().__init__(config)
        self.model = PingGPTModel(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head; a tied one is the table of tokens."""
        return self.graph.embedding if self.graph.head is None else self.graph.head

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """`logits` is (B, T, V) fp32, or of the columns to keep: the last so many, or those that a tensor names.

        `labels` (B, T) are the tokens themselves, −100 where none counts; the loss is the mean in nats.
        """

        def logits(tokens: Tensor, cache: HeldCache | None, places: Tensor | None) -> Tensor:
            return self._logits(tokens, cache, places, logits_to_keep)

        found, past = self._read(logits, input_ids, attention_mask, past_key_values, use_cache, kwargs)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=found, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=found, past_key_values=past)

    def _logits(self, tokens: Tensor, cache: HeldCache | None, places: Tensor | None, keep: int | Tensor) -> Tensor:
        """Of the columns to keep; work for the others ends before the last block."""
        B, T = tokens.shape
        columns = torch.arange(T, device=tokens.device)[slice(-keep, None) if isinstance(keep, int) else keep]
        at = columns.expand(B, -1) if places is None else places[:, columns]  # (B, P)
        if len(columns) < T and not self.training:
            return answering_at(self.graph, at)(tokens, cache)
        keys = None  # of the windows: what is left out follows from them
        if self.training and self.graph.leaves_out:
            keys = torch.randint(1, torch.iinfo(torch.int64).max, (B,), device=tokens.device)
        found = self.graph(tokens, cache, keys=keys)
        return found.gather(1, at[..., None].expand(*at.shape, found.shape[-1]))


def side_by_side(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, T) with −1 for padding, all of it at the right, and the place of each column there, (B, T); None: its own.

    Of a mask for cached tokens, too, the last T columns are those of `input_ids`.
    """
    if attention_mask is None:
        return input_ids, None
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions; give (B, T), 0 where padding stands")
    real = attention_mask[:, -input_ids.shape[1] :].bool()
    tokens = input_ids.masked_fill(~real, -1)
    if real.shape[1] == 1 or not bool((real[:, 1:] & ~real[:, :-1]).any()):
        return tokens, None
    order = torch.argsort(~real, dim=1, stable=True)
    return tokens.gather(1, order), torch.argsort(order, dim=1)
