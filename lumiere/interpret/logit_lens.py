"""The logit lens: what the model would predict if it stopped early.

Shapes: B batch, T position, P chosen position, R stage of the residual stream, K top tokens, E embedding_size, Vocab
vocab_size.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lumiere.components.hooks import run_with_cache
from lumiere.evaluation.scoring import share_of_top, shared_place
from lumiere.interpret.lenses import Lens, stage_names
from lumiere.interpret.result import Receipt, Result, one_sequence, rounding, selected, table
from lumiere.models.transformer import Transformer

NO_TARGET = -1


@dataclass(frozen=True, kw_only=True)
class LogitLens(Result):
    """What the residual stream predicts at each stage. Nats; ranks count from 0, the most probable token.

    Attributes:
        tokens: (T,) the ids that the model was given.
        positions: (P,) the positions that were read.
        stages: (R,) hook points, from the embeddings to the last block's output.
        top_tokens: (R, P, K) the most probable tokens, the best first.
        top_probabilities: (R, P, K).
        targets: (P,) the token that is asked for, by default the next of the text; -1 where the text ends.
        target_probabilities: (R, P), NaN without a target.
        target_ranks: (R, P) how many tokens are more probable than the target; -1 without a target.
        target_ties: (R, P) how many are exactly as probable, the target included; 0 without a target.
        entropies: (R, P) of the stage's distribution.
        divergences: (R, P) KL(final || stage).
        decision_stages: (P,) the decision depth as an index into `stages`: the first from which on the top token is
            the model's final one at every stage.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    stages: tuple[str, ...]
    top_tokens: np.ndarray
    top_probabilities: np.ndarray
    targets: np.ndarray
    target_probabilities: np.ndarray
    target_ranks: np.ndarray
    target_ties: np.ndarray
    entropies: np.ndarray
    divergences: np.ndarray
    decision_stages: np.ndarray

    @property
    def target_places(self) -> np.ndarray:
        """The target's rank, (R, P); the mean rank of tied tokens; NaN without a target."""
        return np.where(self.targets == NO_TARGET, np.nan, shared_place(self.target_ranks, self.target_ties))

    @property
    def target_on_top(self) -> np.ndarray:
        """The probability, (R, P), that the target is the top token if tied tokens share the first place; or NaN."""
        num_equal = np.where(self.targets == NO_TARGET, np.nan, self.target_ties)
        return share_of_top(self.target_ranks, num_equal, 1)

    def rows(self) -> Iterator[Mapping[str, Any]]:
        columns, asked, missing = list(self.positions), self.targets != NO_TARGET, np.array(None)
        return table(
            {"stage": self.stages, "position": self.positions},
            token=np.array(self.tokens)[columns],
            top_token=self.top_tokens[..., 0],
            top_probability=self.top_probabilities[..., 0],
            target=np.where(asked, self.targets, missing),
            target_probability=np.where(asked, self.target_probabilities, missing),
            target_rank=np.where(asked, self.target_ranks, missing),
            target_ties=np.where(asked, self.target_ties, missing),
            entropy=self.entropies,
            divergence=self.divergences,
            is_decided=self.decision_stages <= np.arange(len(self.stages))[:, None],
        )


def logit_lens(
    model: Transformer,
    tokens: Sequence[int],
    positions: Sequence[int] | None = None,
    sublayers: bool = False,
    target: int | None = None,
    top_k: int = 1,
    lens: Lens | None = None,
) -> LogitLens:
    """Predict the next token from the residual stream before, between and after the blocks: `softmax(norm(r) W_U)`.

    nostalgebraist 2020, "interpreting GPT: the logit lens". The final norm takes its scale from each stage's own
    stream; the scale of the last stage would only change the temperature of the others. Where the output head is the
    token embedding, the first stage often predicts the very token that it is given.

    The decision depth is the prediction depth of Belrose et al. 2023, "Eliciting Latent Predictions from Transformers
    with the Tuned Lens", here by the logit lens (Geva et al. 2022 call it the saturation of the top token). Others are
    the depth by nearest neighbors (Baldock et al. 2021), the first stage that has the token on top even if a later
    one loses it, and the first whose confidence passes a threshold (Schuster et al. 2022).

    Args:
        tokens: (T,) ids, at most `context_size` of them.
        positions: which of them to look at (None: all).
        sublayers: look between the attention and the feed-forward part of each block too, where the latter follows.
        target: the token whose probability and rank are asked for (None: at each position the next of the text).
        top_k: how many of the most probable tokens to keep.
        lens: a fitted lens, which translates each stage first; it has no `sublayers`.
    """
    columns = list(selected(positions, len(tokens)))
    stages = stage_names(model, sublayers)
    following = [*tokens[1:], NO_TARGET]
    targets = torch.tensor([following[position] if target is None else target for position in columns])
    has_target = targets != NO_TARGET
    index_P1 = targets.clamp(min=0).unsqueeze(1)
    statistics: dict[str, list[torch.Tensor]] = {}
    with torch.inference_mode():
        output, cache = run_with_cache(model, one_sequence(model, tokens), stages)
        final_PV = log_probabilities(output.logits, columns)
        final_probabilities_PV = final_PV.exp()
        final_entropy_P = -torch.einsum("pv,pv->p", final_probabilities_PV, final_PV)
        difference = 0.0
        # One stage at a time, by the operations of the model on the same shape, so that the last stage is equal bit for
        # bit, and there are never more than a few matrices of T x Vocab.
        for number, stage in enumerate(stages):
            resid_BTE = cache[stage] if lens is None else lens.translate(number, cache[stage])
            logits_BTV = model.unembed(model.final_norm(resid_BTE))
            difference = float((logits_BTV - output.logits).abs().max())
            stage_PV = log_probabilities(logits_BTV, columns)
            top = stage_PV.topk(top_k, dim=-1)
            target_P1 = stage_PV.gather(-1, index_P1)
            entropy_P = -torch.einsum("pv,pv->p", stage_PV.exp(), stage_PV)
            cross_entropy_P = -torch.einsum("pv,pv->p", final_probabilities_PV, stage_PV)
            found = {
                "top_tokens": top.indices,
                "top_probabilities": top.values.exp(),
                "target_probabilities": target_P1[:, 0].exp().where(has_target, math.nan),
                "target_ranks": (stage_PV > target_P1)[:, : model.num_tokens].sum(-1).where(has_target, NO_TARGET),
                "target_ties": (stage_PV == target_P1)[:, : model.num_tokens].sum(-1).where(has_target, 0),
                "entropies": entropy_P,
                "divergences": cross_entropy_P - final_entropy_P,
            }
            for name, values in found.items():
                statistics.setdefault(name, []).append(values)
    arrays = {name: torch.stack(values).numpy() for name, values in statistics.items()}
    excess = {
        "no divergence is negative": -arrays["divergences"],
        "no entropy exceeds that of chance": arrays["entropies"] - math.log(model.vocab_size),
    }
    return LogitLens(
        tokens=tuple(tokens),
        positions=tuple(columns),
        stages=tuple(stages),
        targets=targets.numpy(),
        decision_stages=decisions(arrays["top_tokens"][..., 0]),
        **arrays,
        receipts=(
            Receipt("the last stage gives the model's own logits", difference, 0.0),
            # NaN, if there is one, is the maximum.
            *(Receipt(check, float(np.maximum(x.max(), 0.0)), rounding(model)) for check, x in excess.items()),
        ),
    )


def log_probabilities(logits_BTV: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
    """Return (P, Vocab) of the first sequence, in float64 on the CPU, since not every device has float64."""
    return logits_BTV[0, positions].cpu().double().log_softmax(-1)


def decisions(top_tokens_RP: np.ndarray) -> np.ndarray:
    """Return the first stage, (P,), from which on the top token is that of the last stage."""
    differs_RP = top_tokens_RP != top_tokens_RP[-1]
    stages_R1 = np.arange(1, len(top_tokens_RP) + 1)[:, None]
    return (differs_RP * stages_R1).max(axis=0)
