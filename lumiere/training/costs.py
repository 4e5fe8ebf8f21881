"""Costs of a training run computed from its config: parameters, FLOPs, bytes."""

from dataclasses import dataclass

from lumiere.config.schema import RunConfig
from lumiere.models.transformer import empty_model
from lumiere.training.schedule import most_snapshots

FLOAT32_BYTES = 4
NUM_CHECKPOINTS = 4
"""`best`, `latest`, `previous`, and the one being written."""


PARTS = {
    "norms": "norm",  # also the norms of queries and keys
    "token_embedding": "token_embedding",
    "positions": "position_embedding",
    "attention": "attention",
    "feedforward": "feedforward",
    "output_head": "output_head",
}
"""What stands in the names of a part's parameters; the first that fits counts."""


@dataclass(frozen=True)
class Parameters:
    """Number of parameters by part. A tied output head is the token embedding, and counts once."""

    token_embedding: int
    positions: int
    attention: int
    feedforward: int
    norms: int
    output_head: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in PARTS)


@dataclass(frozen=True)
class Disk:
    """Bytes of the largest set of checkpoints that a run ever has, without headers (a few kB per file).

    Attributes:
        checkpoint: Size of a full checkpoint: weights, their average, and optimizer state.
        snapshot: Size of a checkpoint with weights only.
        num_snapshots: Largest number of snapshots at once.
    """

    checkpoint: int
    snapshot: int
    num_snapshots: int

    @property
    def total(self) -> int:
        return NUM_CHECKPOINTS * self.checkpoint + self.num_snapshots * self.snapshot


def count_parameters(config: RunConfig) -> Parameters:
    """Return the number of parameters of the model that `build_model` builds."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in empty_model(config).named_parameters():
        counts[next(part for part in PARTS if PARTS[part] in name)] += parameter.numel()
    return Parameters(**counts)


def count_block_matrices(config: RunConfig) -> int:
    """Return the parameters of the matrices in the blocks, without biases: what `optimizer: muon` updates by Muon."""
    named = empty_model(config).named_parameters()
    return sum(parameter.numel() for name, parameter in named if name.startswith("blocks.") and parameter.ndim == 2)


def flops_per_token(config: RunConfig) -> int:
    """Return the FLOPs of one trained position: the matrix products of its forward and backward pass.

    Forward, each weight of a matrix takes a multiplication and an addition, the output head's too (an embedding lookup
    takes none). Each head takes as many for its scores and its weighted values over all `context_size` positions,
    masked ones included: `2 N + 2 L H T (K + V)`. Backward takes twice that. With K = V = Q this is the
    `6 N + 12 L H Q T` of Chowdhery et al. 2022, "PaLM", appendix B; the `2 N` is Kaplan et al. 2020, "Scaling Laws for
    Neural Language Models", section 2.1. Norms, softmax and the optimizer are not counted.
    """
    model = config.model
    weights = config.tokenizer.vocab_size * model.embedding_size + count_block_matrices(config)
    attended = model.num_layers * model.num_heads * model.context_size * (model.d_key + model.d_value)
    return 3 * 2 * (weights + attended)


def weight_bytes(config: RunConfig) -> int:
    """Return the bytes of the weights, float32 in any precision. The gradients take the same."""
    return FLOAT32_BYTES * count_parameters(config).total


def optimizer_bytes(config: RunConfig) -> int:
    """Return the bytes of the optimizer state: two averages per parameter for AdamW, one momentum for Muon.

    An EMA of the weights counts too.
    """
    parameters = count_parameters(config)
    moved_by_muon = count_block_matrices(config) if config.training.optimizer == "muon" else 0
    averages = 2 if config.training.ema_decay is None else 3
    return FLOAT32_BYTES * (averages * parameters.total - moved_by_muon)


def disk(config: RunConfig, total_steps: int) -> Disk:
    """Return the disk space of the checkpoints of a run of `total_steps`."""
    weights = weight_bytes(config)
    num_snapshots = most_snapshots(total_steps) if config.training.snapshots else 0
    return Disk(weights + optimizer_bytes(config), weights, num_snapshots)
