"""A language model made by Lumiere, for `transformers` 4.57 and newer. Depends on torch and transformers only.

Exported folders hold a copy of this file, which `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`
runs. `config.json` has the settings of Lumiere's `model` section, and weights have Lumiere's names.

Shapes: B batch, T position of the query, S position of the key, E embedding_size, H head, G head of keys and values,
K d_key, V d_value, F d_ff, R rotated numbers of a head.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

ACTIVATIONS = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Of the output, which newer versions of `transformers` renamed."""


class LumiereConfig(PretrainedConfig):
    """The settings of Lumiere's `model` section; its documentation (docs/architectures.md) has their meaning."""

    model_type = "lumiere"
    keys_to_ignore_at_inference = ("past_key_values", "cache")
    attribute_map = {  # noqa: RUF012 (a class attribute of transformers)
        "hidden_size": "embedding_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "head_dim": "d_key",
        "intermediate_size": "d_ff",
        "max_position_embeddings": "context_size",
    }

    def __init__(
        self,
        vocab_size: int = 4096,
        embedding_size: int = 128,
        context_size: int = 64,
        num_layers: int = 4,
        num_heads: int = 4,
        d_key: int = 32,
        d_value: int = 32,
        d_ff: int = 256,
        norm: str = "rms",
        norm_epsilon: float = 1e-6,
        feedforward: str = "swiglu",
        positions: str = "learned",
        rotary_base: float = 10_000.0,
        rotary_fraction: float = 1.0,
        rotary_scaling: dict[str, Any] | None = None,
        attention_windows: list[int | None] | None = None,
        attention_scale: float | None = None,
        num_key_value_heads: int | None = None,
        bias: str = "none",
        tie_embeddings: bool = True,
        parallel_blocks: bool = False,
        query_key_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.embedding_size, self.context_size = vocab_size, embedding_size, context_size
        self.num_layers, self.num_heads, self.d_key, self.d_value, self.d_ff = (
            num_layers,
            num_heads,
            d_key,
            d_value,
            d_ff,
        )
        self.norm, self.norm_epsilon, self.feedforward = norm, norm_epsilon, feedforward
        self.positions, self.rotary_base, self.rotary_fraction = positions, rotary_base, rotary_fraction
        self.rotary_scaling = rotary_scaling
        self.attention_windows, self.attention_scale = attention_windows, attention_scale
        self.num_key_value_heads = num_key_value_heads or num_heads
        self.bias, self.tie_embeddings = bias, tie_embeddings
        self.parallel_blocks, self.query_key_norm = parallel_blocks, query_key_norm
        kwargs["tie_word_embeddings"] = tie_embeddings
        super().__init__(**kwargs)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return float32 or wider, for norms and angles."""
    return torch.promote_types(dtype, torch.float32)


class Norm(nn.Module):
    """`rms`: RMSNorm; `layer`: LayerNorm; `layer_plain`: LayerNorm without parameters; `none`: the identity."""

    def __init__(self, size: int, config: LumiereConfig, kind: str | None = None) -> None:
        super().__init__()
        self.size, self.kind, self.epsilon = size, kind or config.norm, config.norm_epsilon
        self.weight = nn.Parameter(torch.ones(size)) if self.kind in ("rms", "layer") else None
        self.bias = nn.Parameter(torch.zeros(size)) if self.kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        y = x.to(wide(x.dtype))
        if self.kind == "rms":
            y = y / (y.square().mean(-1, keepdim=True) + self.epsilon).sqrt()
        else:
            y = F.layer_norm(y, (self.size,), eps=self.epsilon)
        y = y.to(x.dtype)
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias


class Embedding(nn.Module):
    def __init__(self, num_rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, size))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


def sinusoids(positions_BT: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    exponents = torch.arange(0, size, 2, dtype=dtype, device=positions_BT.device) / size
    angles = positions_BT[..., None].to(dtype) / 10_000.0**exponents
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :size]


def rotation(positions_BT: Tensor, config: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, (B, 1, T, R)."""
    size = round(config.d_key * config.rotary_fraction)
    exponents = torch.arange(0, size, 2, dtype=dtype, device=positions_BT.device) / size
    periods = config.rotary_base**exponents
    if config.rotary_scaling is not None:
        periods = periods * stretch(periods, **config.rotary_scaling)
    angles = positions_BT[:, None, :, None].to(dtype) / periods
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def stretch(
    periods: Tensor,
    type: str,  # noqa: A002 (the name of the setting)
    factor: float,
    original_context_size: int | None,
    low_frequency_factor: float,
    high_frequency_factor: float,
) -> Tensor | float:
    """Return by how much rotations are slower: all of them (linear), or those of long wavelengths (llama3)."""
    if type == "linear" or original_context_size is None:
        return factor
    turns = original_context_size / (2 * math.pi * periods)
    share = (turns - low_frequency_factor) / (high_frequency_factor - low_frequency_factor)
    share = share.clamp(0, 1)
    return 1 / ((1 - share) / factor + share)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + R/2) of the first R numbers of queries or keys."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([(turned * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype), rest], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: LumiereConfig, layer: int) -> None:
        super().__init__()
        size, has_bias = config.embedding_size, config.bias != "none"
        self.layer, self.d_key, self.d_value = layer, config.d_key, config.d_value
        self.groups = config.num_heads // config.num_key_value_heads
        self.scale = config.attention_scale or config.d_key**-0.5
        self.query = nn.Linear(size, config.num_heads * config.d_key, bias=has_bias)
        self.key = nn.Linear(size, config.num_key_value_heads * config.d_key, bias=has_bias)
        self.value = nn.Linear(size, config.num_key_value_heads * config.d_value, bias=has_bias)
        self.output = nn.Linear(config.num_heads * config.d_value, size, bias=config.bias == "all")
        self.query_norm = Norm(config.d_key, config, "rms") if config.query_key_norm else None
        self.key_norm = Norm(config.d_key, config, "rms") if config.query_key_norm else None

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor] | None, seen_B1TS: Tensor, cache: Any, needs_pattern: bool
    ) -> tuple[Tensor, Tensor | None]:
        q = self.query(x).unflatten(-1, (-1, self.d_key)).transpose(1, 2)
        k = self.key(x).unflatten(-1, (-1, self.d_key)).transpose(1, 2)
        v = self.value(x).unflatten(-1, (-1, self.d_value)).transpose(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = k.repeat_interleave(self.groups, dim=1), v.repeat_interleave(self.groups, dim=1)
        pattern = None
        if needs_pattern:
            scores = (q @ k.transpose(-1, -2) * self.scale).masked_fill(~seen_B1TS, -torch.inf)
            pattern = scores.softmax(-1, dtype=wide(x.dtype)).to(x.dtype)
            z = pattern @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_B1TS, scale=self.scale)
        return self.output(z.transpose(1, 2).flatten(-2)), pattern


class FeedForward(nn.Module):
    def __init__(self, config: LumiereConfig) -> None:
        super().__init__()
        size, has_bias = config.embedding_size, config.bias == "all"
        self.kind = config.feedforward
        self.gate = nn.Linear(size, config.d_ff, bias=has_bias) if self.kind in ("swiglu", "geglu") else None
        self.up = nn.Linear(size, config.d_ff, bias=has_bias)
        self.down = nn.Linear(config.d_ff, size, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.kind]
        if self.gate is None:
            return self.down(activation(self.up(x)))
        return self.down(activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: LumiereConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = Norm(config.embedding_size, config)
        self.attention = Attention(config, layer)
        has_feedforward, self.is_parallel = config.feedforward != "none", config.parallel_blocks
        self.feedforward_norm = Norm(config.embedding_size, config) if has_feedforward else None
        self.feedforward = FeedForward(config) if has_feedforward else None

    def forward(self, x: Tensor, *how: Any) -> tuple[Tensor, Tensor | None]:
        added, pattern = self.attention(self.attention_norm(x), *how)
        middle = x + added
        if self.feedforward is None or self.feedforward_norm is None:
            return middle, pattern
        return middle + self.feedforward(self.feedforward_norm(x if self.is_parallel else middle)), pattern


class LumiereForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = LumiereConfig
    base_model_prefix = ""
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (a class attribute of transformers)

    def __init__(self, config: LumiereConfig) -> None:
        super().__init__(config)
        self.token_embedding = Embedding(config.vocab_size, config.embedding_size)
        self.position_embedding = None
        if config.positions == "learned":
            self.position_embedding = Embedding(config.context_size, config.embedding_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.windows = config.attention_windows or [None] * config.num_layers
        self.final_norm = Norm(config.embedding_size, config)
        self.output_head = None
        if not config.tie_embeddings:
            self.output_head = nn.Linear(config.embedding_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.token_embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.output_head  # None where the token embedding is the head

    def _init_weights(self, module: nn.Module) -> None:
        """Only for a model without weights; training with Lumiere starts from other numbers."""
        if isinstance(module, nn.Linear | Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, T, vocab_size); hidden states are the residual stream, not normalized.

        Args:
            attention_mask: (B, S), 0 at padding.
            position_ids: (B, T). Default: counted from the first token that is no padding.
            past_key_values: Keys and values of the positions before, by the name of older versions of `transformers`.
            cache: The same by the name of newer versions.
        """
        x = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        length, device, config = x.shape[1], x.device, self.config
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        num_past = 0 if cache is None else cache.get_seq_length()
        columns_S = torch.arange(num_past + length, device=device)
        rows_T = columns_S[num_past:]
        if position_ids is None:
            position_ids = rows_T[None]
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        if self.position_embedding is not None:
            if num_past + length > config.context_size:
                raise ValueError(f"this model sees at most {config.context_size} tokens, not {num_past + length}")
            x = x + self.position_embedding(position_ids)
        elif config.positions == "sinusoidal":
            x = x + sinusoids(position_ids, config.embedding_size, wide(x.dtype)).to(x.dtype)
        turn = rotation(position_ids, config, wide(x.dtype)) if config.positions == "rotary" else None

        hidden_states, patterns = [], []
        for block, window in zip(self.blocks, self.windows, strict=True):
            distances_TS = rows_T[:, None] - columns_S
            seen_TS = (distances_TS >= 0) if window is None else (distances_TS >= 0) & (distances_TS < window)
            seen_B1TS = seen_TS[None, None]
            if attention_mask is not None:  # a query sees itself at least: a softmax over nothing is NaN
                seen_B1TS = seen_B1TS & attention_mask[:, None, None].bool() | (distances_TS == 0)
            hidden_states.append(x)
            x, pattern = block(x, turn, seen_B1TS, cache, bool(output_attentions))
            patterns.append(pattern)
        hidden_states.append(x)
        normalized = self.final_norm(x[:, -logits_to_keep:])
        head = self.token_embedding if self.output_head is None else self.output_head
        logits = F.linear(normalized, head.weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(patterns) if output_attentions else None,
            **{CACHE_NAME: cache},
        )
