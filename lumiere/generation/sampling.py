"""From the logits of the next token to the next token.

Shapes: V vocabulary.
"""

from dataclasses import dataclass

import torch

from lumiere.errors import LumiereError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Names and order of effect are those of `transformers`.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: keep the k likeliest tokens (None: all). Fan et al. 2018.
        top_p: keep the fewest tokens whose probabilities sum to at least p (None: all). Holtzman et al. 2020.

    Raises:
        LumiereError: if a value is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise LumiereError(f"the temperature must be 0 or more, not {self.temperature}", "0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise LumiereError(f"top-k must be at least 1, not {self.top_k}", "leave it out to keep all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise LumiereError(f"top-p must be more than 0 and at most 1, not {self.top_p}", "0.95 is common")


def probabilities(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution that the next token is drawn from, (V,)."""
    if sampling.temperature == 0:
        return torch.zeros_like(logits_V).scatter(0, logits_V.argmax(keepdim=True), 1.0)
    # Near temperature 0 a quotient may overflow. Less the largest logit and in float64 it can do so only to minus
    # infinity, which softmax takes; plus infinity would give NaN.
    logits_V = ((logits_V - logits_V.max()).double() / sampling.temperature).to(logits_V.dtype)
    if sampling.top_k is not None and sampling.top_k < len(logits_V):
        smallest_kept = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest_kept, -torch.inf)
    if sampling.top_p is not None:
        ascending_V, order_V = logits_V.sort()
        # A token goes if those up to it, from the unlikeliest on, hold no more than 1 - p; the likeliest stays.
        goes_V = ascending_V.softmax(0).cumsum(0) <= 1 - sampling.top_p
        goes_V[-1] = False
        logits_V = logits_V.masked_fill(goes_V.scatter(0, order_V, goes_V), -torch.inf)
    return logits_V.softmax(0)


def sample(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw the next token."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(probabilities(logits_V, sampling), 1, generator=generator))
