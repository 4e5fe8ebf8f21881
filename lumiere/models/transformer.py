"""The model: a decoder-only transformer with pre-RMSNorm, SwiGLU and an output tied to the token embedding.

It computes one function in two ways. `model(tokens)` is the watching path: it returns attention weights and hidden
states and passes through the hook points of `lumiere.components.hooks`. `model.logits(tokens)` is the fast path, for
training, evaluation and generation: it makes none of those.

Shapes: B batch, T position of the query, S position of the key, E embedding_size, H head, L num_layers,
Vocab vocab_size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lumiere.components.hooks import HookPoint
from lumiere.components.kernels import visible_keys
from lumiere.components.layers import (
    Block,
    Dropout,
    LearnedPositions,
    Rotation,
    TokenEmbedding,
    WatchedBlock,
    WatchedRMSNorm,
    rotation_at,
)
from lumiere.components.short_repr import ShortRepr

if TYPE_CHECKING:
    from lumiere.config.schema import RunConfig

# The id of <|pad|>. `lumiere.data.tokenizer` gives it out and must agree; models may not import data.
PADDING_ID = 2


@dataclass(frozen=True)
class TransformerOutput(ShortRepr):
    """What the watching path returns."""

    logits: Tensor
    """(B, T, Vocab)."""
    patterns: tuple[Tensor, ...]
    """(B, H, T, S) of each layer."""
    residuals: tuple[Tensor, ...]
    """(B, T, E) before each block and after the last."""

    # Joined when they are first asked for: the copies would take a tenth of the time of a pass with all activations.
    @cached_property
    def attention_weights(self) -> Tensor:
        """(B, L, H, T, S), the softmax before any dropout: rows sum to 1, and no query looks ahead."""
        return torch.stack(self.patterns, dim=1)

    @cached_property
    def hidden_states(self) -> Tensor:
        """(B, L+1, T, E), the residual stream before each block and after the last, not normalised."""
        return torch.stack(self.residuals, dim=1)


class Transformer(nn.Module):
    """A GPT-style language model.

    Args:
        vocab_size: rows of the token embedding, and logits.
        embedding_size: width of the residual stream.
        context_size: longest sequence, in tokens.
        num_layers: number of blocks.
        num_heads: attention heads in each block.
        d_key: width of a head's queries and keys.
        d_value: width of a head's values.
        d_ff: neurons in each block's feed-forward part.
        dropout: share of the embedding sum and of each part's output that is dropped while training.
        padding_id: the id of padding, which the watching path then hides by itself; None: no id is padding.
        positions: `learned` embeddings, or `rotary`, which makes the model a Llama (Touvron et al. 2023).
        zero_output_init: start the matrices that write to the residual stream at zero.
        activation_checkpointing: on the fast path, keep only what each block reads, and compute the block again in the
            backward pass (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"), with the same dropout.

    Raises:
        ValueError: `positions` is neither, or is rotary with an odd `d_key`.
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
        positions: Literal["learned", "rotary"] = "learned",
        zero_output_init: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if positions not in ("learned", "rotary"):
            raise ValueError(f"positions must be 'learned' or 'rotary', not {positions!r}")
        if positions == "rotary" and d_key % 2:
            raise ValueError(f"rotary positions turn pairs of numbers, so d_key must be even, not {d_key}")
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.context_size = context_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.d_key = d_key
        self.d_value = d_value
        self.d_ff = d_ff
        self.padding_id = padding_id
        self.positions = positions
        self.activation_checkpointing = activation_checkpointing

        self.token_embedding = TokenEmbedding(vocab_size, embedding_size)
        self.hook_embed = HookPoint()
        self.position_embedding = None
        if positions == "learned":
            self.position_embedding = LearnedPositions(context_size, embedding_size)
            self.hook_pos_embed = HookPoint()
        self.dropout = Dropout(dropout)
        blocks = nn.ModuleList(
            Block(embedding_size, num_heads, d_key, d_value, d_ff, dropout) for _ in range(num_layers)
        )
        self.blocks = cast("Sequence[Block]", blocks)  # to a type checker, a ModuleList holds any modules
        self.final_norm = WatchedRMSNorm(embedding_size)
        self._initialize(zero_output_init)

    def _initialize(self, zero_output_init: bool) -> None:
        """Draw every matrix from N(0, 0.02^2), as GPT-2 does; gains stay 1.

        The two matrices of a block that write to the residual stream are smaller by sqrt(2 * num_layers): that many
        independent parts add up there, and so the stream's variance does not grow with depth. Or they are zero.
        """
        for name, parameter in self.named_parameters():
            # Drawing numbers that nobody keeps would load torch's compiler: a second before a model's first token.
            if parameter.ndim == 1 or parameter.is_meta:
                continue
            writes_to_stream = name.endswith(("attention.output.weight", "feedforward.down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.num_layers) if writes_to_stream else 0.02)
            if writes_to_stream and zero_output_init:
                nn.init.zeros_(parameter)

    @property
    def num_parameters(self) -> int:
        """Trainable numbers; the tied output counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, tokens_BT: Tensor, padding_mask_BT: Tensor | None = None) -> TransformerOutput:
        """The watching path. Works with padding on either side.

        Args:
            tokens_BT: token ids, (B, T).
            padding_mask_BT: True where there is a real token. Without it, padding is where `padding_id` is.

        Raises:
            ValueError: as `logits`, or the mask is not boolean or not of the tokens' shape.
        """
        self._check_tokens(tokens_BT)
        if padding_mask_BT is None and self.padding_id is not None:
            padding_mask_BT = tokens_BT != self.padding_id
        if padding_mask_BT is not None and padding_mask_BT.dtype != torch.bool:
            raise ValueError(f"padding_mask must be of type torch.bool, not {padding_mask_BT.dtype}")
        if padding_mask_BT is not None and padding_mask_BT.shape != tokens_BT.shape:
            raise ValueError(
                f"padding_mask has shape {tuple(padding_mask_BT.shape)}, the tokens {tuple(tokens_BT.shape)}"
            )
        batch_size, num_positions = tokens_BT.shape
        visible_B1TS = visible_keys(num_positions, tokens_BT.device, padding_mask_BT)
        positions_T = torch.arange(num_positions, device=tokens_BT.device)
        rotation = self._rotation(positions_T)

        resid_BTE = self.hook_embed(self.token_embedding(tokens_BT))
        if self.position_embedding is not None:
            position_TE = self.position_embedding(positions_T)
            resid_BTE = resid_BTE + self.hook_pos_embed(position_TE.expand(batch_size, -1, -1))
        resid_BTE = self.dropout(resid_BTE)
        watched: list[WatchedBlock] = []
        for block in self.blocks:
            watched.append(block.watch(resid_BTE, visible_B1TS, rotation))
            resid_BTE = watched[-1].resid_post
        return TransformerOutput(
            logits=self.token_embedding.unembed(self.final_norm.watch(resid_BTE)),
            patterns=tuple(layer.pattern for layer in watched),
            residuals=(*(layer.resid_pre for layer in watched), resid_BTE),
        )

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """The fast path: logits (B, T, Vocab) and nothing else.

        Padding on the right needs no mask: attention is causal, so no real token sees what comes after it, and what
        stands at the padding itself is to be ignored. Padding on the left needs the watching path.

        Args:
            tokens_BT: token ids, (B, T), at least one and at most `context_size` long.

        Raises:
            ValueError: the tokens are no matrix of int64 or int32, there are none, or more than `context_size`.
        """
        return self.token_embedding.unembed(self.final_residual(tokens_BT))

    def final_residual(self, tokens_BT: Tensor) -> Tensor:
        """The normalised final residual stream, (B, T, E): `logits` without the product with the embedding.

        A loss that works in chunks takes this and the embedding, and never holds all logits at once.
        """
        self._check_tokens(tokens_BT)
        resid_BTE = self.token_embedding(tokens_BT)
        if self.position_embedding is not None:
            positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
            resid_BTE = resid_BTE + self.position_embedding(positions_T)
        return self.final_residual_from(self.dropout(resid_BTE), layer=0)

    def final_residual_from(self, resid_BTE: Tensor, layer: int) -> Tensor:
        """`final_residual`, given the stream that block `layer` reads, so that the blocks before need not run again.

        Args:
            resid_BTE: (B, T, E), from position 0 on, with padding on the right only.
            layer: `num_layers` is allowed too: then only the norm is left.
        """
        rotation = self._rotation(torch.arange(resid_BTE.shape[1], device=resid_BTE.device))
        recomputes = self.activation_checkpointing and torch.is_grad_enabled()
        for block in islice(self.blocks, layer, None):
            if recomputes:
                resid_BTE = cast("Tensor", checkpoint(block, resid_BTE, rotation, use_reentrant=False))
            else:
                resid_BTE = block(resid_BTE, rotation)
        return self.final_norm(resid_BTE)

    def _rotation(self, positions_T: Tensor) -> Rotation | None:
        """Computed on each call: a stored table would have to follow the model's dtype without losing precision."""
        if self.positions == "learned":
            return None
        dtype = torch.promote_types(self.token_embedding.weight.dtype, torch.float32)
        return rotation_at(positions_T, self.d_key, dtype)

    def _check_tokens(self, tokens_BT: Tensor) -> None:
        if tokens_BT.ndim != 2:
            raise ValueError(f"tokens must have 2 axes (batch, position), not {tokens_BT.ndim}")
        if tokens_BT.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens must be torch.int64 or torch.int32, not {tokens_BT.dtype}")
        if not 1 <= tokens_BT.shape[1] <= self.context_size:
            raise ValueError(f"a sequence must have 1 to {self.context_size} tokens, not {tokens_BT.shape[1]}")


def empty_model(config: "RunConfig") -> Transformer:
    """The model that a config describes without any memory for its weights: to count or to compare their shapes."""
    with torch.device("meta"):
        return build_model(config)


def build_model(config: "RunConfig") -> Transformer:
    """The untrained model that a config describes, with weights from torch's current seed."""
    model = config.model
    return Transformer(
        vocab_size=config.tokenizer.vocab_size,
        embedding_size=model.embedding_size,
        context_size=model.context_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        d_key=model.d_key,
        d_value=model.d_value,
        d_ff=model.d_ff,
        dropout=model.dropout,
        padding_id=PADDING_ID,
        positions=model.positions,
        zero_output_init=model.zero_output_init,
        activation_checkpointing=config.training.activation_checkpointing,
    )
