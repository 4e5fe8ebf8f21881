"""How good a model is on a text: loss, perplexity, and the averages that others report, each under its own name."""

import math
import time
from dataclasses import dataclass

import torch

from lumiere.components.kernels import linear_cross_entropy_losses
from lumiere.data.batches import Windows, batches_in_order
from lumiere.data.dataset import SplitFacts
from lumiere.distributed import SINGLE_PROCESS, ProcessGroup
from lumiere.models.transformer import Transformer


@dataclass(frozen=True)
class Evaluation:
    """The losses of one pass over all windows of a text. Losses are in nats.

    Attributes:
        loss: mean over all predicted tokens.
        perplexity: exp(loss).
        mean_batch_loss: mean of the batches' mean losses, which the Lumiére card reports as 4.4180.
        mean_batch_perplexity: mean of the batches' perplexities, which the card reports as 85.01. By Jensen's
            inequality it is never less than exp(mean_batch_loss).
        bits_per_byte: loss in bits per UTF-8 byte of the text after the tokenizer's normalizer, comparable between
            tokenizers with the same normalizer.
        word_perplexity: perplexity of a word, line ends counted as words.
        num_tokens: predicted tokens; those in the overlap of two windows are counted in each.
        num_windows: windows.
        num_batches: batches.
        batch_size: windows of a batch, on which the card's two averages depend.
        seconds: how long the evaluation took.
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
        model: on any device; it is left in the mode in which it came.
        windows: the text.
        facts: of the same text, for the figures a byte and a word.
        batch_size: windows scored at once; only the two averages over batches depend on it.
        processes: processes that share the batches out; the result is that of one process.
    """
    start = time.perf_counter()
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        sums, counts = [], []
        with torch.inference_mode():
            for batch in batches_in_order(windows, batch_size, processes.rank, processes.size):
                residual = model.final_residual(batch.tokens.to(device)).flatten(0, 1)
                targets = batch.targets.to(device).flatten()
                losses = linear_cross_entropy_losses(residual, model.token_embedding.weight, targets)
                # Summed in float64, so that the result does not depend on how the windows are batched; on the CPU,
                # since not every device has float64.
                sums.append(losses.cpu().double().sum())
                counts.append(batch.num_targets)
        # Each batch is one process' number and nobody else's, so that the addition rounds nothing.
        by_batch = torch.zeros(2, -(-len(windows) // batch_size), dtype=torch.float64)
        mine = by_batch[:, processes.rank :: processes.size]
        columns = torch.tensor([[total.item() for total in sums], counts], dtype=torch.float64)
        mine.copy_(columns[:, : mine.shape[1]])  # one more where this process only kept the others company
        totals, num_targets = processes.all_reduce_tensor(by_batch)
    finally:
        model.train(was_training)
    means = totals / num_targets
    num_tokens = int(num_targets.sum())
    loss = totals.sum().item() / num_tokens
    # The mean loss is taken for every token of the text once, also for those that two windows share.
    nats = loss * facts.num_targets
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


def exponential(nats: float) -> float:
    """exp(nats), infinite where that is beyond a float."""
    return math.exp(nats) if nats < 700 else math.inf
