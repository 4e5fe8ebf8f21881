"""Evaluate a model on a text: loss, perplexity, and the averages that others report, each under its own name."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lumiere.components.kernels import linear_cross_entropy_losses
from lumiere.data.batches import Windows, batches_in_order
from lumiere.data.dataset import SplitFacts
from lumiere.distributed import SINGLE_PROCESS, ProcessGroup
from lumiere.models.transformer import Transformer


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass over all windows of a text. Losses are in nats.

    Attributes:
        loss: Mean over all predicted tokens.
        perplexity: exp(loss).
        mean_batch_loss: Mean of the mean losses of batches; the original Lumière model card reports 4.4180.
        mean_batch_perplexity: Mean of the perplexities of batches; the card reports 85.01. By Jensen's inequality it is
            at least exp(mean_batch_loss).
        bits_per_byte: Loss in bits per UTF-8 byte of the normalized text, comparable between tokenizers with the same
            normalizer. With one target per document: the bits of these targets per byte of the whole text.
        word_perplexity: Perplexity per white-space separated word, line ends counted as words.
        num_tokens: Predicted tokens; those in the overlap of two windows count twice.
        batch_size: Windows per batch, which the two averages over batches depend on.
        seconds: Duration of the evaluation.
    """

    loss: float
    perplexity: float
    mean_batch_loss: float
    mean_batch_perplexity: float
    bits_per_byte: float
    word_perplexity: float
    num_tokens: int
    num_windows: int
    num_batches: int
    batch_size: int
    seconds: float


def evaluate(
    model: Transformer, windows: Windows, facts: SplitFacts, batch_size: int, processes: ProcessGroup = SINGLE_PROCESS
) -> Evaluation:
    """Score `windows` without dropout, in the precision of the model's weights.

    Args:
        model: On any device. Its training mode is restored.
        facts: Sizes of the same text, for the metrics per byte and per word.
        batch_size: Windows scored at once. Only the two averages over batches depend on it.
        processes: Processes that divide the batches among them. The result is that of a single process.
    """
    start = time.perf_counter()
    device = next(model.parameters()).device
    sums, counts = [], []
    with evaluation_mode(model):
        for batch in batches_in_order(windows, batch_size, processes.rank, processes.size):
            residual = model.final_residual(batch.tokens.to(device)).flatten(0, 1)
            targets = batch.targets.to(device).flatten()
            losses = linear_cross_entropy_losses(residual, model.unembedding, targets)
            # In float64, so that sums do not depend on the batches; on the CPU, as not every device has it.
            sums.append(losses.cpu().double().sum())
            counts.append(batch.num_targets)
        # Every entry is nonzero in one process only, so the all-reduce does not round.
        by_batch = torch.zeros(2, -(-len(windows) // batch_size), dtype=torch.float64)
        mine = by_batch[:, processes.rank :: processes.size]
        columns = torch.tensor([[total.item() for total in sums], counts], dtype=torch.float64)
        mine.copy_(columns[:, : mine.shape[1]])  # drops the batch without targets of a rank without data
        totals, num_targets = processes.all_reduce_tensor(by_batch)
    means = totals / num_targets
    num_tokens = int(num_targets.sum())
    loss = totals.sum().item() / num_tokens
    # The mean loss, counted once for every token of the text, also for those in two windows.
    nats = loss * (num_tokens if windows.only_last else facts.num_targets)
    return Evaluation(
        loss=loss,
        perplexity=exponential(loss),
        mean_batch_loss=means.mean().item(),
        mean_batch_perplexity=means.exp().mean().item(),
        bits_per_byte=nats / math.log(2) / facts.num_normalized_bytes,
        word_perplexity=exponential(nats / facts.num_words),
        num_tokens=num_tokens,
        num_windows=len(windows),
        num_batches=len(totals),
        batch_size=batch_size,
        seconds=time.perf_counter() - start,
    )


@contextmanager
def evaluation_mode(model: Transformer) -> Iterator[None]:
    """Switch off dropout and gradients, then restore the model's mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def exponential(nats: float) -> float:
    """Return exp(nats), or infinity if that overflows."""
    return math.exp(nats) if nats < 700 else math.inf
