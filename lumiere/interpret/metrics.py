"""What an intervention is measured by: a number for each prompt, from the model's logits where it is read.

Shapes: B pair of prompts, N interventions, any or no axes before B; Vocab vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lumiere.errors import LumiereError, check_choice
from lumiere.interpret.prompts import PromptPairs

Metric = Callable[[Tensor, PromptPairs], Tensor]
"""Maps the logits at the read positions, (..., B, Vocab), and the pairs to (..., B). Differentiable."""


def chosen(values_BV: Tensor, tokens_B: Tensor | None) -> Tensor:
    """Return the value of one token of each pair, (..., B)."""
    if tokens_B is None:
        raise LumiereError("the prompts name no target", "give --target TOKEN, or --metric kl")
    ids = tokens_B.to(values_BV.device).expand(values_BV.shape[:-1]).unsqueeze(-1)
    return values_BV.gather(-1, ids).squeeze(-1)


def logit_difference(logits_BV: Tensor, pairs: PromptPairs) -> Tensor:
    """Return the target's logit minus the logit of `versus`."""
    if pairs.versus is None:
        raise LumiereError(
            "a logit difference needs a second token", "give --vs TOKEN, or --metric log-probability, which needs none"
        )
    return chosen(logits_BV, pairs.targets) - chosen(logits_BV, pairs.versus)


def log_probability(logits_BV: Tensor, pairs: PromptPairs) -> Tensor:
    """Return ln p(target), in nats."""
    return chosen(logits_BV.log_softmax(-1), pairs.targets)


def loss(logits_BV: Tensor, pairs: PromptPairs) -> Tensor:
    """Return -ln p(target), in nats."""
    return -log_probability(logits_BV, pairs)


def probability(logits_BV: Tensor, pairs: PromptPairs) -> Tensor:
    """Return p(target)."""
    return chosen(logits_BV.softmax(-1), pairs.targets)


def divergence_from(clean_BV: Tensor) -> Metric:
    """Return the metric KL(clean || ·), in nats, given the logits of the clean run, (B, Vocab).

    It is 0 at the clean run, and so is its gradient there.
    """
    expected_BV = clean_BV.log_softmax(-1)

    def divergence(logits_BV: Tensor, pairs: PromptPairs) -> Tensor:
        del pairs
        found_BV = logits_BV.log_softmax(-1)
        return torch.where(expected_BV > -torch.inf, expected_BV.exp() * (expected_BV - found_BV), 0.0).sum(-1)

    return divergence


METRICS: dict[str, Metric] = {
    "logit-difference": logit_difference,
    "log-probability": log_probability,
    "loss": loss,
    "probability": probability,
}
METRIC_NAMES = (*METRICS, "kl")


def find_metric(name: str, clean_BV: Tensor) -> Metric:
    """Return the metric of that name.

    Args:
        clean_BV: The logits of the clean run at the read positions, (B, Vocab), for `kl`.

    Raises:
        LumiereError: There is no such metric.
    """
    check_choice("metric", name, METRIC_NAMES)
    return METRICS.get(name) or divergence_from(clean_BV)


def default_metric(pairs: PromptPairs) -> str:
    """Return `logit-difference`, or `log-probability` without a second token.

    A probability saturates and hides what works against the target (Zhang & Nanda 2023, "Towards Best Practices of
    Activation Patching in Language Models").
    """
    return "log-probability" if pairs.versus is None and pairs.targets is not None else "logit-difference"
