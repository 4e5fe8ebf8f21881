"""`run.inspect`: which tokens of a text a prediction depends on.

Importing this module loads neither torch nor numpy.
"""

from typing import TYPE_CHECKING, Unpack

from lumiere.api.analysis import Analysis, analyze
from lumiere.api.options import Options, Prompt, RunAnalyses
from lumiere.api.target import MAX_COUNTED_TOKENS, InspectTarget, count_tokens, parse_indices, parse_token
from lumiere.errors import LumiereError, check_choice

if TYPE_CHECKING:
    import numpy as np

    from lumiere.interpret.saliency import Saliency

BASELINES = ("mean", "start", "padding", "end", "zero")
QUADRATURES = ("gauss", "midpoint")
"""Those of `lumiere.interpret.saliency`, whose import would load torch."""


class Attributions(RunAnalyses):
    """Attributions of a prediction to the tokens of its text."""

    def saliency(
        self,
        prompt: Prompt = None,
        *,
        target: int | str | None = None,
        vs: int | str | None = None,
        log_prob: bool = False,
        pos: int = -1,
        baseline: str = "mean",
        quadrature: str = "gauss",
        steps: int = 50,
        **options: Unpack[Options],
    ) -> "Analysis[Saliency]":
        """Which tokens a prediction depends on: integrated gradients, gradient times input, and occlusion.

        Args:
            target: Token whose logit is explained. Default: the most probable.
            vs: Token whose logit is subtracted. Default: the most probable other one.
            log_prob: Explain the log-probability of the target instead of a difference of logits.
            pos: Position whose prediction is explained. Default: the last.
            baseline: What embeddings are replaced by, one of `BASELINES`: their mean over the training split, a special
                token's, or zero.
            quadrature: Rule of the integral, one of `QUADRATURES`.
            steps: Points of the integral at first; they double up to 256 until the attributions sum to the change.
        """
        from lumiere.interpret.saliency import MAX_STEPS, saliency
        from lumiere.report.figures.saliency import draw_saliency

        check_choice("baseline", baseline, BASELINES)
        check_choice("quadrature", quadrature, QUADRATURES)
        if log_prob and vs is not None:
            raise LumiereError("--log-prob and --vs are two scores", "choose one")
        if not 1 <= steps <= MAX_STEPS:
            raise LumiereError(f"--steps {steps} is out of range", f"give 1 to {MAX_STEPS}")
        found = self._target(prompt, **options)
        tokenizer, tokens = found.opened.tokenizer, found.tokens
        (position,) = parse_indices(pos, len(tokens), "position")
        wanted, other = (None if name is None else parse_token(name, tokenizer) for name in (target, vs))
        if wanted is not None and wanted == other:
            raise LumiereError(f"--target and --vs are the same token, {wanted}", "choose two different tokens")
        weights, source = choose_baselines(found, baseline)
        return analyze(
            "saliency",
            found,
            lambda model: saliency(model, tokens, weights, position, wanted, other, log_prob, quadrature, steps),
            lambda result: draw_saliency(result, found.label),
            averaged_over=source,
        )


def choose_baselines(target: InspectTarget, name: str) -> "tuple[dict[str, np.ndarray], str | None]":
    """Return the token weights of a baseline and of another one, and what a mean is over; None if neither is.

    The other is the mean, or, for the mean, the first that the tokenizer has of the start, padding and end tokens.

    Raises:
        LumiereError: the tokenizer has no such token.
    """
    import numpy as np

    opened = target.opened
    special = {
        "start": opened.tokenizer.start_id,
        "padding": opened.model.padding_id,
        "end": next(iter(opened.tokenizer.end_ids), None),
    }
    if name in special and special[name] is None:
        there = [known for known in BASELINES if special.get(known, 0) is not None]
        raise LumiereError(f"the tokenizer has no {name} token", f"choose one of {', '.join(there)}")
    other = "mean" if name != "mean" else next((known for known, token in special.items() if token is not None), "zero")
    weights, source = {}, None
    for chosen in (name, other):
        weights[chosen] = np.zeros(opened.model.vocab_size)
        if chosen == "mean":
            weights[chosen], source = token_frequencies(target)
        elif chosen != "zero":
            weights[chosen][special[chosen]] = 1.0
    return weights, source


def token_frequencies(target: InspectTarget) -> "tuple[np.ndarray, str]":
    """Count each token in the start of the training split; without it, once each token of the tokenizer."""
    import numpy as np

    model = target.opened.model
    if target.has_training_split:
        ids = target.corpus().splits["train"].ids[:MAX_COUNTED_TOKENS]
        return count_tokens(ids, model.vocab_size).astype(np.float64), f"{len(ids):,} tokens of the training split"
    weights = np.zeros(model.vocab_size)
    weights[target.opened.tokenizer.text_ids] = 1.0
    return weights, f"all {int(weights.sum()):,} tokens of the tokenizer, since the training split is not there"
