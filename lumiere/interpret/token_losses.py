"""The loss, surprisal, entropy and rank of each token of a text.

Shapes: T position, Vocab vocab_size.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lumiere.components.kernels import linear_cross_entropy_losses
from lumiere.evaluation.ngrams import Baseline
from lumiere.evaluation.scoring import share_of_top, shared_place
from lumiere.interpret.result import Receipt, Result, one_sequence, relative_error, rounding, table
from lumiere.models.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class TokenLosses(Result):
    """The predictions of all tokens but the first. Losses are in nats.

    Attributes:
        tokens: (T,) the ids that the model was given.
        losses: (T-1,) -ln P(token | what precedes it).
        surprisals: (T-1,) the same in bits.
        entropies: (T-1,) in nats: the loss that the model expects.
        ranks: (T-1,) how many tokens are more probable; 0 is the top prediction.
        ties: (T-1,) how many are exactly as probable, the token included.
        predictions: (T-1,) the most probable token.
        probabilities: (T-1,) of that token.
        unigram_losses: (T-1,) of the token's frequency in training; None if unknown.
        bigram_losses: (T-1,) of a model that sees the token before; None if unknown.
    """

    tokens: tuple[int, ...]
    losses: np.ndarray
    surprisals: np.ndarray
    entropies: np.ndarray
    ranks: np.ndarray
    ties: np.ndarray
    predictions: np.ndarray
    probabilities: np.ndarray
    unigram_losses: np.ndarray | None
    bigram_losses: np.ndarray | None

    @property
    def places(self) -> np.ndarray:
        """(T-1,) the rank; the mean rank of tied tokens."""
        return shared_place(self.ranks, self.ties)

    @property
    def on_top(self) -> np.ndarray:
        """(T-1,) the probability that the token is the top prediction if tied tokens share the first place."""
        return share_of_top(self.ranks, self.ties, 1)

    def rows(self) -> Iterator[Mapping[str, Any]]:
        baselines = {"unigram_loss": self.unigram_losses, "bigram_loss": self.bigram_losses}
        return table(
            {"position": range(1, len(self.tokens))},
            token=self.tokens[1:],
            loss=self.losses,
            surprisal=self.surprisals,
            entropy=self.entropies,
            rank=self.ranks,
            ties=self.ties,
            prediction=self.predictions,
            probability=self.probabilities,
            **{name: losses for name, losses in baselines.items() if losses is not None},
        )


def token_losses(
    model: Transformer, tokens: Sequence[int], unigram: Baseline | None = None, bigram: Baseline | None = None
) -> TokenLosses:
    """Compute loss, surprisal `-log2 P(token | context)` (Shannon 1948; Hale 2001), rank and entropy of each token.

    The entropy is `-sum P ln P` over the vocabulary. A loss far above it is a surprise; where both are high, the model
    was uncertain.

    Args:
        tokens: (T,) ids, 2 to `context_size` of them.
        unigram: fitted to the training split.
        bigram: the same.

    Raises:
        ValueError: there is only one token.
    """
    if len(tokens) < 2:
        raise ValueError("there is one token, and nothing to predict from it")
    tokens_1T = one_sequence(model, tokens)
    targets_T = tokens_1T[0, 1:]
    with torch.inference_mode():
        logits_TVocab = model.logits(tokens_1T)[0, :-1]
        log_probabilities = logits_TVocab.log_softmax(-1)
        probabilities = log_probabilities.exp()
        losses = -log_probabilities.gather(1, targets_T[:, None])[:, 0]
        entropies = torch.special.entr(probabilities).sum(-1)
        target_logits = logits_TVocab.gather(1, targets_T[:, None])
        residual = model.final_residual(tokens_1T)[0, :-1]
        evaluated = linear_cross_entropy_losses(residual, model.unembedding, targets_T)
    tolerance, most = rounding(model), math.log(model.vocab_size)
    # A log-probability is rounded in proportion to the logits.
    largest = max(1.0, float(logits_TVocab.abs().max()))
    sums = probabilities.cpu().sum(-1, dtype=torch.float64)
    values = losses.cpu().numpy()
    row_1T = tokens_1T.cpu().numpy()
    return TokenLosses(
        tokens=tuple(tokens),
        losses=values,
        surprisals=values / math.log(2),
        entropies=entropies.cpu().numpy(),
        ranks=(logits_TVocab > target_logits)[:, : model.num_tokens].sum(-1).cpu().numpy(),
        ties=(logits_TVocab == target_logits)[:, : model.num_tokens].sum(-1).cpu().numpy(),
        predictions=logits_TVocab.argmax(-1).cpu().numpy(),
        probabilities=probabilities.amax(-1).cpu().numpy(),
        unigram_losses=None if unigram is None else unigram.losses(row_1T)[0],
        bigram_losses=None if bigram is None else bigram.losses(row_1T)[0],
        receipts=(
            Receipt("probabilities sum to 1", float((sums - 1).abs().max()) / largest, tolerance),
            Receipt("the losses are those of an evaluation", relative_error(losses, evaluated), tolerance),
            Receipt("no entropy above ln of the vocabulary", max(0.0, float(entropies.max()) - most), tolerance * most),
        ),
    )
