"""One pass of a model over a text that keeps, for each token that is scored, all that an evaluation is made of.

Slower than `lumiere.evaluation.evaluate`, which a training calls; what it gives does not depend on how many windows a
caller puts into a batch, since the windows go through the model in groups of their own.

Shapes: S scored tokens, M rows of a chunk, N rows, T tokens of a row, E embedding_size, Vocab vocab_size.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lumiere.baselines.ngrams import Baseline
from lumiere.components.kernels import IGNORED
from lumiere.components.short_repr import ShortRepr
from lumiere.data.batches import make_batch
from lumiere.data.dataset import TokenizedSplit
from lumiere.data.windows import Windows
from lumiere.errors import LumiereError
from lumiere.models.transformer import Transformer

TOKENS_AT_ONCE = 2048
"""Tokens that go through the model together. Fixed, because another number gives other rounding errors."""
LOGITS_AT_ONCE = 2**21
"""8 MB in float32, which stay in the cache."""


@dataclass(frozen=True)
class Protocol:
    """Which windows are scored, and which of their tokens.

    Attributes:
        stride: tokens from the start of a window to the start of the next in a document.
        once: a token that two windows share is scored in the first of them only; otherwise in each.
    """

    stride: int
    once: bool

    @property
    def name(self) -> str:
        return f"stride-{self.stride}" if self.once else "windows"


def training_windows(split: TokenizedSplit, context_size: int, overlap: int) -> tuple[Windows, Protocol]:
    """The windows of training, tokens in the overlap of two scored in both: as `evaluate`, and the Lumiére card."""
    windows = split.windows(context_size, overlap)
    return windows, Protocol(windows.stride, once=False)


def strided_windows(split: TokenizedSplit, context_size: int, stride: int) -> tuple[Windows, Protocol]:
    """Windows that begin `stride` tokens apart, each token scored once.

    Every token sees at least `context_size - stride + 1` tokens before it, or all of its document; with a stride of 1
    that is the longest context that the model can have.

    Raises:
        LumiereError: `stride` is not between 1 and `context_size`.
    """
    if not 1 <= stride <= context_size:
        raise LumiereError(
            f"a stride of {stride:,} does not fit windows of {context_size:,} tokens",
            f"give 1 to {context_size:,}; the smaller, the longer the contexts and the time",
        )
    return split.windows(context_size, context_size + 1 - stride), Protocol(stride, once=True)


@dataclass(frozen=True)
class Scores(ShortRepr):
    """What is kept of each scored token, in the order of the windows: arrays (S,).

    Attributes:
        losses: in nats, float64.
        at_1, at_5: the probability that the token is among the 1 or 5 likeliest. It is 0 or 1 but where several tokens
            are exactly as likely as it: these share the places that they have together.
        confidences: the probability of the likeliest token.
        positions: how many tokens of the window came before.
        tokens: the id.
        documents: the document.
        windows: the window.
        baselines: the losses of models that count, on the same tokens with the same contexts.
    """

    losses: np.ndarray
    at_1: np.ndarray
    at_5: np.ndarray
    confidences: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray
    documents: np.ndarray
    windows: np.ndarray
    baselines: Mapping[str, np.ndarray]


class ModelScores(NamedTuple):
    """The part of `Scores` that comes from logits: (S,), float64 on the CPU."""

    losses: Tensor
    at_1: Tensor
    at_5: Tensor
    confidences: Tensor


def score(
    model: Transformer, windows: Windows, once: bool, baselines: Mapping[str, Baseline], take: Callable[[Scores], None]
) -> None:
    """Score the windows without dropout, in the precision of the model's weights.

    Args:
        model: on any device; it is left in the mode in which it came.
        once: as `Protocol.once`.
        baselines: fitted models, by name.
        take: called with the scores of each group of windows, in order. A long text has too many to keep.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for scores in score_parts(model, windows, once, baselines):
                take(scores)
    finally:
        model.train(was_training)


def score_parts(
    model: Transformer, windows: Windows, once: bool, baselines: Mapping[str, Baseline]
) -> Iterator[Scores]:
    """Yield the scores of each group of windows."""
    device = next(model.parameters()).device
    size = max(1, TOKENS_AT_ONCE // windows.context_size)
    for first in range(0, len(windows), size):
        indices = np.arange(first, min(first + size, len(windows)))
        batch = make_batch(windows, indices)
        documents = windows.documents(indices)
        is_scored = (batch.targets != IGNORED).numpy()
        if once:
            continues = documents == windows.documents(indices - 1)
            continues[indices == 0] = False
            # All but the last `stride` targets stand in the window before too.
            is_scored[continues, : windows.context_size - windows.stride] = False
        rows, columns = np.nonzero(is_scored)
        residual_SE = model.final_residual(batch.tokens.to(device))[torch.from_numpy(is_scored).to(device)]
        tokens_S = batch.targets[rows, columns]
        found = score_logits(residual_SE, model.token_embedding.weight, tokens_S.to(device))
        windows_NT, _ = windows.cut(indices)
        own = {
            **{name: values.cpu().double().numpy() for name, values in found._asdict().items()},
            "positions": columns + 1,
            "tokens": tokens_S.numpy(),
            "documents": documents[rows],
            "windows": indices[rows],
        }
        theirs = {name: baseline.losses(windows_NT)[rows, columns] for name, baseline in baselines.items()}
        yield Scores(**own, baselines=theirs)


def score_logits(residual_SE: Tensor, weight_VocabE: Tensor, tokens_S: Tensor) -> ModelScores:
    """The scores of tokens by the logits `residual @ weight.T`, of which only a chunk exists at a time."""
    size = max(1, LOGITS_AT_ONCE // len(weight_VocabE))
    wide = torch.float64 if residual_SE.device.type == "cpu" else torch.float32  # not every device has float64
    parts = []
    for residual_ME, tokens_M in zip(residual_SE.split(size), tokens_S.split(size), strict=True):
        logits = residual_ME @ weight_VocabE.T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits -= logits.amax(1, keepdim=True)
        own_M1 = logits.gather(1, tokens_M.unsqueeze(1))
        # Counted in float32, which is exact up to 2**24 and several times as fast as adding up booleans.
        marks = torch.empty_like(logits)
        num_above = torch.gt(logits, own_M1, out=marks).sum(1)
        num_equal = torch.eq(logits, own_M1, out=marks).sum(1)
        sums_M = logits.exp_().sum(1, dtype=wide)
        at_1_M, at_5_M = (share_of_top(num_above.to(wide), num_equal, k) for k in (1, 5))
        parts.append(ModelScores(sums_M.log() - own_M1.squeeze(1), at_1_M, at_5_M, 1 / sums_M))
    return ModelScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


Counts = TypeVar("Counts", Tensor, np.ndarray)


def share_of_top(num_above: Counts, num_equal: Counts, k: int) -> Counts:
    """The probability that a token is among the k most probable, if tied tokens share their places.

    Args:
        num_above: how many tokens are more probable.
        num_equal: how many are exactly as probable, the token itself included.
    """
    return ((k - num_above) / num_equal).clip(0, 1)


def shared_place(num_above: Counts, num_equal: Counts) -> Counts:
    """The mean of the places that tied tokens have together, counted from 0."""
    return num_above + (num_equal - 1) / 2
