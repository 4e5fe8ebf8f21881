"""`run.inspect.patch`: what it reads, and how it is computed and drawn.

Importing this module loads neither torch nor numpy.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from lumiere.api.analysis import Analysis, analyze
from lumiere.api.options import Options, Prompt, RunAnalyses
from lumiere.api.pairs import TokenName, read_pairs
from lumiere.api.target import Indices, parse_indices
from lumiere.errors import LumiereError, check_choice

if TYPE_CHECKING:
    from lumiere.interpret.patching import Patching


class Patches(RunAnalyses):
    """Activation patching."""

    def patch(
        self,
        prompt: Prompt = None,
        corrupt: Prompt = None,
        *,
        target: TokenName = None,
        vs: TokenName = None,
        pairs: str | Path | None = None,
        site: str = "resid_pre",
        by: str | None = None,
        kind: str = "denoising",
        metric: str | None = None,
        layer: Indices = None,
        unit: Indices = None,
        pos: Indices = None,
        read: int = -1,
        attribution: bool = False,
        **options: Unpack[Options],
    ) -> "Analysis[Patching]":
        """Which activations carry the difference between two prompts: activation patching.

        Args:
            prompt: The clean prompt.
            corrupt: A prompt of as many tokens that lacks the behavior.
            target: Token that the clean prompt should predict. Default: the most probable after it.
            vs: Token to compare it with. Default, without a target: the most probable after the corrupt prompt.
            pairs: A JSONL file of pairs in place of the prompts.
            site: What is patched: resid_pre, resid_mid, resid_post, attn_out, mlp_out, q, k, v, z, pattern or neurons.
            by: What is patched together: all of a layer, a position, a unit (head or neuron), or a unit at a position
                (both). Default: unit for sites that have units, otherwise position.
            kind: denoising, noising or tracing.
            metric: logit-difference, log-probability, loss, probability or kl. Default: the first, or the second
                without `vs`.
            layer, unit, pos: What to patch. Default: all.
            read: Position whose prediction is measured.
            attribution: Whether to estimate the same from gradients, and correlate both.
        """
        from lumiere.interpret.patching import BY, KINDS, SITES, patch
        from lumiere.report.figures.patching import draw_patching

        check_choice("site", site, SITES)
        check_choice("kind", kind, KINDS)
        where = SITES[site]
        by = by or ("unit" if where.unit else "position")
        check_choice("unit of patching", by, BY)
        for option, value, needed in (("--unit", unit, ("unit", "both")), ("--pos", pos, ("position", "both"))):
            if value is not None and by not in needed:
                raise LumiereError(f"{option} needs --by {needed[0]} or both, and it is {by}", f"add --by {needed[0]}")
        found = self._target(prompt, **options)
        model, layers = found.opened.model, found.layers(layer)
        contrast, source = read_pairs(found, corrupt, target, vs, pairs, read)
        if metric != "kl":
            contrast = contrast.with_predictions(model)
        units = None if unit is None else parse_indices(unit, where.count(model), "unit")
        positions = None if pos is None else parse_indices(pos, contrast.clean.shape[1], "position")
        return analyze(
            "patch",
            found,
            lambda model: patch(
                model, contrast, site, by, kind, metric, layers, units, positions, attribution, found.seed
            ),
            lambda result: draw_patching(result, found.label),
            source,
        )
