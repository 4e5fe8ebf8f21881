"""The model: a decoder-only transformer. Its settings choose the parts; the defaults are those of the model card.

There is one forward pass, `Transformer.final_residual`. Training, evaluation and generation call it; `model(tokens)`
adds logits, attention weights and hidden states.

Shapes: B batch, T position of the query, S position of the key, E embedding_size, H head, L num_layers,
Vocab vocab_size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lumiere.components.hooks import HookPoint, has_hooks
from lumiere.components.kernels import attention_mask, attention_pattern
from lumiere.components.layers import (
    Block,
    Dropout,
    ForwardRecord,
    KVCache,
    LayerCache,
    LearnedPositions,
    Norm,
    TokenEmbedding,
    rotation_at,
    sinusoids_at,
)
from lumiere.components.short_repr import ShortRepr
from lumiere.config.schema import ModelConfig, RunConfig

PADDING_ID = 2  # of <|pad|>, as in `lumiere.data.tokenizer`, which models may not import


@dataclass(frozen=True)
class TransformerOutput(ShortRepr):
    """The result of `model(tokens)`. Attention weights and hidden states are computed when they are first read."""

    logits: Tensor
    """(B, T, Vocab)."""
    residuals: tuple[Tensor, ...]
    """(B, T, E) before each block and after the last."""
    kept_patterns: Sequence[Tensor | tuple[Tensor, Tensor, float, Tensor | None]]

    @cached_property
    def patterns(self) -> tuple[Tensor, ...]:
        """(B, H, T, S) of each layer."""
        return tuple(kept if isinstance(kept, Tensor) else attention_pattern(*kept) for kept in self.kept_patterns)

    @cached_property
    def attention_weights(self) -> Tensor:
        """(B, L, H, T, S), the softmax before any dropout: rows sum to 1, and no query looks ahead."""
        return torch.stack(self.patterns, dim=1)

    @cached_property
    def hidden_states(self) -> Tensor:
        """(B, L+1, T, E), the residual stream before each block and after the last, not normalized."""
        return torch.stack(self.residuals, dim=1)


class Transformer(nn.Module):
    """A GPT-style language model.

    Args:
        vocab_size: Rows of the token embedding, and logits.
        padding_id: Id of padding, which `model(tokens)` hides by itself. None: no id is padding.
        activation_checkpointing: In training, keep only what each block reads, and compute the block again in the
            backward pass (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"), with the same dropout.
        settings: Those of `lumiere.config.schema.ModelConfig`, such as `norm` and `feedforward`; the other arguments
            are settings too.

    Raises:
        ValueError: A setting is unknown, has a wrong value, or contradicts another.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        context_size: int,
        num_layers: int,
        num_heads: int,
        d_key: int,
        d_value: int,
        d_ff: int,
        dropout: float = 0.1,
        padding_id: int | None = None,
        activation_checkpointing: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        sizes = {"embedding_size": embedding_size, "context_size": context_size, "num_layers": num_layers}
        sizes |= {"num_heads": num_heads, "d_key": d_key, "d_value": d_value, "d_ff": d_ff}
        try:
            chosen = ModelConfig.model_validate({**sizes, "dropout": dropout, **settings})
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            path = problem.get("ctx", {}).get("path", f"model.{'.'.join(map(str, problem['loc']))}")
            raise ValueError(f"{path}: {problem['msg']}") from None
        self.settings = chosen
        self.vocab_size, self.embedding_size, self.context_size = vocab_size, embedding_size, context_size
        self.num_tokens = (
            vocab_size  # fewer where rows of an imported embedding stand for no token: no rank counts them
        )
        self.num_layers, self.num_heads = num_layers, num_heads
        self.d_key, self.d_value, self.d_ff = d_key, d_value, d_ff
        self.padding_id, self.activation_checkpointing = padding_id, activation_checkpointing
        self.token_embedding = TokenEmbedding(vocab_size, embedding_size)
        self.hook_embed = HookPoint()
        self.position_embedding = None
        if chosen.positions == "learned":
            self.position_embedding = LearnedPositions(context_size, embedding_size)
        self.hook_pos_embed = HookPoint() if chosen.positions in ("learned", "sinusoidal") else None
        self.dropout = Dropout(dropout)
        blocks = nn.ModuleList(Block(chosen) for _ in range(num_layers))
        self.blocks = cast("Sequence[Block]", blocks)  # to a type checker, a ModuleList holds any modules
        self.windows = chosen.attention_windows or [None] * num_layers
        self.final_norm = Norm(embedding_size, chosen.norm, chosen.norm_epsilon, has_hooks=True)
        self.output_head = None if chosen.tie_embeddings else nn.Linear(embedding_size, vocab_size, bias=False)
        self._initialize(chosen.zero_output_init)

    def _initialize(self, zero_output_init: bool) -> None:
        """Draw every matrix from N(0, 0.02^2), as GPT-2 does; gains stay 1, biases are 0.

        The two matrices of a block that write to the residual stream are smaller by sqrt(2 * num_layers), so that the
        variance of the stream, a sum of that many independent parts, does not grow with depth. Or they are zero.
        """
        for name, parameter in self.named_parameters():
            # Drawing numbers for a meta tensor would load torch's compiler: a second before a model's first token.
            if parameter.is_meta:
                continue
            if parameter.ndim == 1:
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                continue
            writes_to_stream = name.endswith(("attention.output.weight", "feedforward.down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.num_layers) if writes_to_stream else 0.02)
            if writes_to_stream and zero_output_init:
                nn.init.zeros_(parameter)

    @property
    def num_parameters(self) -> int:
        """Number of parameters; a tied output counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_trained_parameters(self) -> int:
        """Number of those that training updates."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    @property
    def unembedding(self) -> Tensor:
        """The output head, (Vocab, E): the logits are its product with the normalized final residual stream."""
        return (self.token_embedding if self.output_head is None else self.output_head).weight

    def unembed(self, normalized_BTE: Tensor) -> Tensor:
        """Return the logits of a normalized residual stream, (B, T, Vocab)."""
        return F.linear(normalized_BTE, self.unembedding)

    def readout(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None]:
        """Return the matrix (Vocab, E) and the offset (Vocab,) that map `r / s(r)` to the logits.

        r is the final residual stream and s the scale of the final norm, whose gain, centering and bias are folded in.
        """
        return self.final_norm.folded(self.unembedding.detach().to(dtype))

    def forward(
        self, tokens_BT: Tensor, padding_mask_BT: Tensor | None = None, cache: KVCache | None = None
    ) -> TransformerOutput:
        """Return logits, attention weights and hidden states. Works with padding on either side.

        Args:
            tokens_BT: Token ids, (B, T), at least one and at most `context_size` long.
            padding_mask_BT: True where there is a real token. Default: padding is where `padding_id` is.
            cache: Keys and values of the positions before; then no token is padding.

        Raises:
            ValueError: The tokens or the mask have a wrong type or shape, or there is both a mask and a cache.
        """
        self._check_tokens(tokens_BT)
        if padding_mask_BT is None and self.padding_id is not None and cache is None:
            padding_mask_BT = tokens_BT != self.padding_id
        record = ForwardRecord()
        final_BTE = self.final_residual(tokens_BT, padding_mask_BT, cache, record)
        return TransformerOutput(self.unembed(final_BTE), tuple(record.residuals), record.patterns)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Return only the logits, (B, T, Vocab); padding must be on the right, as in `final_residual`."""
        return self.unembed(self.final_residual(tokens_BT))

    def final_residual(
        self,
        tokens_BT: Tensor,
        padding_mask_BT: Tensor | None = None,
        cache: KVCache | None = None,
        record: ForwardRecord | None = None,
        fill_only: bool = False,
    ) -> Tensor:
        """Return the normalized final residual stream, (B, T, E): the forward pass up to the unembedding.

        A loss that works in chunks takes this and the embedding, and never holds all logits at once. Without a mask,
        padding must be on the right, where no real token sees it; ignore the results at padding.

        Args:
            record: Receives the residual stream and the patterns, the stream after the last block included.
            fill_only: Fill `cache`, then stop: the last block's feed-forward part and the norm are skipped, and the
                result is not what this function returns otherwise.
        """
        self._check_tokens(tokens_BT)
        num_positions = tokens_BT.shape[1]
        positions = torch.arange(num_positions, device=tokens_BT.device)
        layer_caches, num_keys, is_causal = None, num_positions, True
        if padding_mask_BT is not None:
            self._check_padding_mask(padding_mask_BT, tokens_BT, cache)
            is_causal = bool(padding_mask_BT.all())
        if cache is not None:
            lengths, num_keys = cache.lengths, cache.num_keys
            positions = positions + (lengths if isinstance(lengths, int) else lengths[:, None])
            layer_caches = cache.layers(positions)
            # The causal mask is enough where nothing is cached, and the one new token of each row sees all keys.
            sees_all = isinstance(lengths, int) and num_keys == lengths + 1
            is_causal = num_keys == num_positions or sees_all
        masks = self._masks(positions, num_keys, is_causal, padding_mask_BT)

        resid_BTE = self.hook_embed(self.token_embedding(tokens_BT))
        if self.hook_pos_embed is not None:
            if self.position_embedding is not None:
                position_TE = self.position_embedding(positions)
            else:
                position_TE = sinusoids_at(positions, self.embedding_size, self._table_dtype()).to(resid_BTE.dtype)
            if self.hook_pos_embed.is_set:
                position_TE = self.hook_pos_embed(position_TE.expand(resid_BTE.shape))
            resid_BTE = resid_BTE + position_TE
        return self._run_blocks(self.dropout(resid_BTE), 0, positions, masks, layer_caches, record, fill_only)

    def continue_from(self, resid_BTE: Tensor, layer: int, cache: KVCache | None = None) -> Tensor:
        """Return `final_residual`, given the stream that block `layer` reads, (B, T, E), with padding on the right.

        At `num_layers` only the norm is left.

        Args:
            cache: Keys and values of the same number of positions before in all rows, of the layers from `layer` on;
                those of the layers before are not looked at.
        """
        positions = torch.arange(resid_BTE.shape[1], device=resid_BTE.device)
        if cache is None:
            return self._run_blocks(resid_BTE, layer, positions, self._masks(positions, len(positions)))
        positions = positions + cache.lengths
        masks = self._masks(positions, cache.num_keys, cache.num_keys == len(positions))
        return self._run_blocks(resid_BTE, layer, positions, masks, cache.layers(positions))

    def _table_dtype(self) -> torch.dtype:
        """Return the type of tables of angles, which grow with the position: float32 or wider."""
        return torch.promote_types(self.token_embedding.weight.dtype, torch.float32)

    def _masks(
        self,
        positions: Tensor,
        num_keys: int,
        is_causal: bool = True,
        padding_mask_BT: Tensor | None = None,
    ) -> list[Tensor | None]:
        """Return the mask of each layer, (B, 1 or H, T, S); None if it is the causal mask, over all `num_keys`."""
        masks: dict[int | None, Tensor | None] = {}
        for window in set(self.windows):
            masks[window] = None
            if is_causal and (window is None or window >= num_keys):
                continue
            rows, dtype = positions.view(-1, positions.shape[-1]), self.token_embedding.weight.dtype
            mask_B1TS = attention_mask(rows, num_keys, dtype, padding_mask_BT, window)
            if len(rows) > 1:  # once, and not in every layer
                mask_B1TS = mask_B1TS.expand(-1, self.num_heads, -1, -1).contiguous()
            masks[window] = mask_B1TS
        return [masks[window] for window in self.windows]

    def _run_blocks(
        self,
        resid_BTE: Tensor,
        first_layer: int,
        positions: Tensor,
        masks: Sequence[Tensor | None],
        caches: list[LayerCache] | None = None,
        record: ForwardRecord | None = None,
        fill_only: bool = False,
    ) -> Tensor:
        rotation = None
        if self.settings.rotary_size:
            # Computed in each call: a stored table would have to follow the model's dtype without losing precision.
            rotation = rotation_at(positions, self.settings, self._table_dtype())
        # A block that is computed again, after a `with hooked` block has ended, would miss the hooks.
        recomputes = (
            self.activation_checkpointing and torch.is_grad_enabled() and record is None and not has_hooks(self)
        )
        for layer in range(first_layer, self.num_layers):
            block, mask_B1TS, cache = self.blocks[layer], masks[layer], None if caches is None else caches[layer]
            if fill_only and layer == self.num_layers - 1:
                block.attention(block.attention_norm(resid_BTE), rotation, mask_B1TS, cache)
                return resid_BTE
            if recomputes:
                resid_BTE = cast("Tensor", checkpoint(block, resid_BTE, rotation, mask_B1TS, use_reentrant=False))
            else:
                resid_BTE = block(resid_BTE, rotation, mask_B1TS, cache, record)
        if record is not None:
            record.residuals.append(resid_BTE)
        return self.final_norm(resid_BTE)

    def _check_padding_mask(self, padding_mask_BT: Tensor, tokens_BT: Tensor, cache: KVCache | None) -> None:
        if cache is not None:
            raise ValueError("a cache takes no padding mask")
        if padding_mask_BT.dtype != torch.bool:
            raise ValueError(f"padding_mask must be of type torch.bool, not {padding_mask_BT.dtype}")
        if padding_mask_BT.shape != tokens_BT.shape:
            shapes = tuple(padding_mask_BT.shape), tuple(tokens_BT.shape)
            raise ValueError(f"padding_mask has shape {shapes[0]}, the tokens {shapes[1]}")

    def _check_tokens(self, tokens_BT: Tensor) -> None:
        if tokens_BT.ndim != 2:
            raise ValueError(f"tokens must have 2 axes (batch, position), not {tokens_BT.ndim}")
        if tokens_BT.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens must be torch.int64 or torch.int32, not {tokens_BT.dtype}")
        if not 1 <= tokens_BT.shape[1] <= self.context_size:
            raise ValueError(f"a sequence must have 1 to {self.context_size} tokens, not {tokens_BT.shape[1]}")


def empty_model(config: RunConfig) -> Transformer:
    """Return the model that a config describes, without memory for its weights: to count or compare their shapes."""
    with torch.device("meta"):
        return build_model(config)


def build_model(config: RunConfig) -> Transformer:
    """Return the untrained model that a config describes, with weights drawn from torch's current seed."""
    return Transformer(
        vocab_size=config.tokenizer.vocab_size,
        padding_id=PADDING_ID if config.tokenizer.path is None else None,
        activation_checkpointing=config.training.activation_checkpointing,
        **config.model.model_dump(),
    )
