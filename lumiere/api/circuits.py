"""`run.inspect.circuit`: what it reads, and how it is computed and drawn.

Importing this module loads neither torch nor numpy.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from lumiere.api.analysis import Analysis, analyze
from lumiere.api.options import Options, Prompt, RunAnalyses
from lumiere.api.pairs import TokenName, read_pairs
from lumiere.errors import check_choice

if TYPE_CHECKING:
    from lumiere.interpret.circuit import Circuit


class Circuits(RunAnalyses):
    """Circuits: the edges between parts of the model."""

    def circuit(
        self,
        prompt: Prompt = None,
        corrupt: Prompt = None,
        *,
        target: TokenName = None,
        vs: TokenName = None,
        pairs: str | Path | None = None,
        metric: str | None = None,
        ablation: str = "corrupt",
        by: str = "exact",
        threshold: float = 0.01,
        max_edges: int = 20_000,
        read: int = -1,
        **options: Unpack[Options],
    ) -> "Analysis[Circuit]":
        """Which edges between parts of the model a behavior needs: each one is cut.

        Args:
            prompt: The clean prompt.
            corrupt: A prompt of as many tokens that lacks the behavior.
            target: Token that the clean prompt should predict. Default: the most probable after it.
            vs: Token to compare it with. Default, without a target: the most probable after the corrupt prompt.
            pairs: A JSONL file of pairs in place of the prompts.
            metric: logit-difference, log-probability, loss, probability or kl. Default: the first, or the second
                without `vs`.
            ablation: What a cut edge carries: corrupt, mean-per-position, mean or zero.
            by: exact; or eap or eap-ig, estimates that take a few passes for all edges together.
            threshold: Share of the difference between the prompts from which an edge belongs to the circuit.
            max_edges: That are cut one by one; above it, `exact` is refused.
            read: Position whose prediction is measured.
        """
        from lumiere.interpret.circuit import METHODS, find_circuit
        from lumiere.interpret.edge_ablation import ABLATIONS
        from lumiere.report.figures.circuit import draw_circuit

        check_choice("ablation", ablation, ABLATIONS)
        check_choice("method", by, METHODS)
        found = self._target(prompt, **options)
        contrast, source = read_pairs(found, corrupt, target, vs, pairs, read)
        if metric != "kl":
            contrast = contrast.with_predictions(found.opened.model)
        return analyze(
            "circuit",
            found,
            lambda model: find_circuit(model, contrast, metric, ablation, by, threshold, max_edges, found.seed),
            draw_circuit,
            source,
        )
