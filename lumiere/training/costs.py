"""Costs of a training run computed from its config: parameters, FLOPs, bytes."""

from dataclasses import dataclass

from torch import nn

from lumiere.config.schema import RunConfig
from lumiere.models.transformer import empty_model
from lumiere.training.freezing import trainable
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


def flops_per_token(config: RunConfig) -> int:
    """Return the FLOPs of one trained position: the matrix products of its forward and backward pass.

    Forward, each weight of a matrix takes a multiplication and an addition, the output head's too (an embedding lookup
    takes none). Each head takes as many for its scores and its weighted values over all `context_size` positions,
    masked ones included: `2 N + 2 L H T (K + V)`. Backward takes twice that. With K = V = Q this is the
    `6 N + 12 L H Q T` of Chowdhery et al. 2022, "PaLM", appendix B; the `2 N` is Kaplan et al. 2020, "Scaling Laws for
    Neural Language Models", section 2.1. Norms, softmax and the optimizer are not counted.

    Of frozen weights there is no gradient, and blocks before the first that has something to train have no backward
    pass.
    """
    model, settings = trainable(config), config.model
    head = config.tokenizer.vocab_size * settings.embedding_size
    attended = settings.num_heads * settings.context_size * (settings.d_key + settings.d_value)
    products = head * (1 + model.unembedding.requires_grad)
    # Whether the gradient of the stream is needed here: something up to here is trained.
    embeddings = [part for part in (model.token_embedding, model.position_embedding) if part is not None]
    is_reached = any(is_trained(part) for part in embeddings)
    for block in model.blocks:
        is_reached = is_reached or is_trained(block)
        matrices = [parameter for parameter in block.parameters() if parameter.ndim == 2]
        weights = sum(matrix.numel() for matrix in matrices)
        products += weights + attended + sum(matrix.numel() for matrix in matrices if matrix.requires_grad)
        products += weights + 2 * attended if is_reached else 0
    is_reached = is_reached or is_trained(model.final_norm)
    return 2 * (products + head * is_reached)


def is_trained(part: nn.Module) -> bool:
    """Return whether training updates some of a module's parameters."""
    return any(parameter.requires_grad for parameter in part.parameters())


def weight_bytes(config: RunConfig) -> int:
    """Return the bytes of the weights, float32 in any precision."""
    return FLOAT32_BYTES * count_parameters(config).total


def gradient_bytes(config: RunConfig) -> int:
    """Return the bytes of the gradients, which frozen weights do not have."""
    return FLOAT32_BYTES * trainable(config).num_trained_parameters


def optimizer_bytes(config: RunConfig) -> int:
    """Return the bytes of the optimizer state: two averages per trained parameter for AdamW, one momentum for Muon.

    An EMA of the weights counts too.
    """
    trained = [(name, p) for name, p in trainable(config).named_parameters() if p.requires_grad]
    total = sum(parameter.numel() for _, parameter in trained)
    moved_by_muon = sum(p.numel() for name, p in trained if name.startswith("blocks.") and p.ndim == 2)
    averages = 2 if config.training.ema_decay is None else 3
    return FLOAT32_BYTES * (averages * total - (moved_by_muon if config.training.optimizer == "muon" else 0))


def disk(config: RunConfig, total_steps: int, is_fine_tuned: bool = False) -> Disk:
    """Return the disk space of the checkpoints of a run of `total_steps`.

    Args:
        is_fine_tuned: Whether it has a parent, and so keeps the snapshot of step 0 in any case.
    """
    weights = weight_bytes(config)
    num_snapshots = most_snapshots(total_steps) if config.training.snapshots else int(is_fine_tuned)
    return Disk(weights + optimizer_bytes(config), weights, num_snapshots)
