"""`run.inspect`: what each analysis reads, and how it is computed and drawn.

`lumiere inspect` prints the same analyses, and takes its defaults from here. Importing this module loads neither torch
nor numpy.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from lumiere.api import comparison, snapshots
from lumiere.api.activations import SplitActivations
from lumiere.api.analysis import Analysis, analyze
from lumiere.api.attributions import Attributions
from lumiere.api.causes import BATCH_SIZE, Causes
from lumiere.api.directions import Directions
from lumiere.api.interchanges import Interchanges
from lumiere.api.lenses import Lenses
from lumiere.api.options import Options, Prompt
from lumiere.api.patching import Patches
from lumiere.api.target import Indices, InspectTarget, count_tokens, parse_token
from lumiere.errors import LumiereError, check_choice

if TYPE_CHECKING:
    import numpy as np

    from lumiere.api.report import Report
    from lumiere.api.runs import OpenedRun
    from lumiere.data.batches import Batch
    from lumiere.evaluation.ngrams import BigramModel
    from lumiere.interpret.activations import Activations
    from lumiere.interpret.attention import AttentionPatterns, CombinedAttention
    from lumiere.interpret.dynamics import Dynamics
    from lumiere.interpret.head_scores import HeadScores
    from lumiere.interpret.head_weights import HeadWeights
    from lumiere.interpret.logit_attribution import LogitAttribution
    from lumiere.interpret.model_diff import ModelDiff
    from lumiere.interpret.summary import ModelSummary
    from lumiere.interpret.token_losses import TokenLosses
    from lumiere.models.transformer import Transformer

KINDS = ("pattern", "value-weighted", "norm-weighted", "mean", "max", "rollout")
"""Those of `lumiere.interpret.attention`, whose import would load torch."""


class Inspect(Interchanges, Lenses, Causes, Patches, Attributions, Directions, SplitActivations):
    """The analyses of a run's model.

    Layers, heads, neurons and positions are numbers from 0, or lists such as `[0, 2]` or `"0,2-3"`; the default is all.

    All raise `LumiereError` for an unknown choice, a text that is empty or too long, or a part that the model lacks.
    """

    def summary(self, *, windows: int = 256, seed: int = 0, verify: bool = False) -> "Analysis[ModelSummary]":
        """Parameters, norms, ranks and gains of the weights, what each part writes, and checks for what looks broken.

        Args:
            windows: Validation windows to run; 0 for the weights alone.
        """
        from lumiere.interpret.summary import summarize
        from lumiere.report.figures.bars import draw_summary

        target = self._target(seed=seed, verify=verify)
        batches, token_counts, source = summary_inputs(target, windows)
        return analyze("summary", target, lambda model: summarize(model, batches, token_counts), draw_summary, source)

    def attention(
        self,
        prompt: Prompt = None,
        *,
        layer: Indices = None,
        head: Indices = None,
        kind: str = "pattern",
        **options: Unpack[Options],
    ) -> "Analysis[AttentionPatterns | CombinedAttention]":
        """What each head attends to.

        Args:
            kind: One of `KINDS`. `value-weighted` and `norm-weighted` scale each weight by the size of what is read,
                `mean` and `max` combine the heads of a layer, `rollout` follows attention through all layers.
        """
        check_choice("kind", kind, KINDS)
        target = self._target(prompt, **options)
        layers, heads, tokens = target.layers(layer), target.heads(head), target.tokens
        from lumiere.interpret.attention import WEIGHTED, attention_patterns, combined_attention
        from lumiere.report.figures.heat_maps import draw_attention

        compute: Callable[..., Any] = attention_patterns if kind in WEIGHTED else combined_attention
        return analyze(
            "attention",
            target,
            lambda model: compute(model, tokens, layers, heads, kind),
            lambda result: draw_attention(result, target.label),
        )

    def heads(
        self,
        prompt: Prompt = None,
        *,
        layer: Indices = None,
        head: Indices = None,
        threshold: float = 0.4,
        **options: Unpack[Options],
    ) -> "Analysis[HeadScores]":
        """What each head is for: previous-token, current-token, first-token, duplicate-token, induction, copying.

        Without a text, on sequences of random tokens that are repeated once.

        Args:
            threshold: Minimum score of a head with a role.
        """
        from lumiere.interpret.head_scores import score_heads
        from lumiere.report.figures.bars import draw_heads

        target = self._target(prompt, **options)
        layers, chosen = target.layers(layer), target.heads(head)
        tokens_NT, source = target.scored_sequences()
        windows, averaged = target.spread_windows_if_any(), target.occurring_tokens
        return analyze(
            "heads",
            target,
            lambda model: score_heads(model, tokens_NT, windows, averaged, layers, chosen, threshold),
            draw_heads,
            source,
            averaged_over=target.averaged_over,
        )

    def weights(
        self,
        *,
        layer: Indices = None,
        head: Indices = None,
        directions: int = 2,
        top_k: int = 5,
        seed: int = 0,
        verify: bool = False,
    ) -> "Analysis[HeadWeights]":
        """What each head connects, by its weights alone: OV and QK circuits, and composition with other heads.

        Args:
            layer, head: The circuits to decompose; compositions are of all heads.
            directions: Singular directions with tokens.
            top_k: Tokens of each.
        """
        from lumiere.interpret.head_weights import head_weights
        from lumiere.report.figures.head_weights import draw_head_weights

        target = self._target(seed=seed, verify=verify)
        layers, heads, listed = target.layers(layer), target.heads(head), target.occurring_tokens
        return analyze(
            "weights",
            target,
            lambda model: head_weights(model, layers, heads, directions, top_k, listed, seed),
            draw_head_weights,
            "the weights",
            averaged_over=target.averaged_over,
        )

    def logits(
        self,
        prompt: Prompt = None,
        *,
        target: int | str | None = None,
        vs: int | str | None = None,
        by: str = "layer",
        raw: bool = False,
        log_prob: bool = False,
        pos: Indices = -1,
        **options: Unpack[Options],
    ) -> "Analysis[LogitAttribution]":
        """Which part of the model writes a logit: direct logit attribution.

        By default, the mean logit of the tokens that occur in the training split is subtracted.

        Args:
            target: Token to explain. Default: the most probable.
            vs: Explain the target's logit minus the logit of this token.
            by: layer, head, neuron or source.
            raw: Explain the logit itself; subtract nothing.
            log_prob: Explain the log-probability: subtract the mean logit under the prediction.
            pos: Positions of the text. Default: the last.
        """
        from lumiere.interpret.logit_attribution import LEVELS, logit_attribution
        from lumiere.report.figures.bars import draw_logits

        check_choice("level", by, LEVELS)
        references = {"--raw": raw, "--log-prob": log_prob, "--vs": vs is not None}
        given = [name for name, is_given in references.items() if is_given]
        if len(given) > 1:
            raise LumiereError(f"{given[0]} and {given[1]} are two references", "choose one")
        found = self._target(prompt, **options)
        opened, tokens = found.opened, found.tokens
        positions = found.positions(pos)
        wanted, other = (None if name is None else parse_token(name, opened.tokenizer) for name in (target, vs))
        if wanted is not None and wanted == other:
            raise LumiereError(f"--target and --vs are the same token, {wanted}", "choose two different tokens")
        averaged, averaged_over = (None, None) if given else (found.occurring_tokens, found.averaged_over)
        return analyze(
            "logits",
            found,
            lambda model: logit_attribution(model, tokens, positions, wanted, other, not raw, by, averaged, log_prob),
            lambda result: draw_logits(result, found.label),
            averaged_over=averaged_over,
        )

    def tokens(self, prompt: Prompt = None, **options: Unpack[Options]) -> "Analysis[TokenLosses]":
        """How well each token is predicted: loss, surprisal, entropy and rank, beside n-gram baselines."""
        from lumiere.interpret.token_losses import token_losses
        from lumiere.report.figures.heat_maps import draw_tokens

        target = self._target(prompt, **options)
        ids = target.tokens
        if len(ids) < 2:
            raise LumiereError("the text has one token and nothing to predict", "give a longer text")
        bigram = fit_bigram(target)
        unigram = bigram.unigram if bigram else None
        return analyze(
            "tokens",
            target,
            lambda model: token_losses(model, ids, unigram, bigram),
            lambda result: draw_tokens(result, target.label),
            baselines="the run's training split" if bigram else None,
        )

    def cache(
        self, prompt: Prompt = None, *, names: str | Sequence[str] | None = None, **options: Unpack[Options]
    ) -> "Analysis[Activations]":
        """The activations on a text, for analyses of your own: `cache(...).values[name]`.

        Args:
            names: Of activations, such as `blocks.*.attn.hook_pattern`; those of TransformerLens. Default: all.
        """
        from lumiere.components.hooks import matching_names
        from lumiere.interpret.activations import activations
        from lumiere.report.figures.heat_maps import draw_activations

        target = self._target(prompt, **options)
        patterns = [names] if isinstance(names, str) else list(names or ["*"])
        matching_names(target.opened.model, patterns)
        tokens = target.tokens
        return analyze(
            "cache",
            target,
            lambda model: activations(model, tokens, patterns),
            lambda result: draw_activations(result, target.label),
        )

    def dynamics(
        self,
        prompt: Prompt = None,
        *,
        metric: str | Sequence[str] | None = None,
        every: int = 1,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[Options],
    ) -> "Analysis[Dynamics]":
        """How the model developed: metrics of the other analyses along the snapshots of the run, and phase changes.

        Args:
            metric: Names of metrics, of docs/inspect.md.
            every: Read every N-th snapshot, and the last.
            progress: Called with the number of snapshots done, and of all.
        """
        from lumiere.interpret.dynamics import DEFAULT_METRICS, METRICS, follow
        from lumiere.persistence.checkpoint_manager import snapshot_steps
        from lumiere.persistence.metrics import read_history
        from lumiere.report.figures.dynamics import draw_dynamics

        asked = [metric] if isinstance(metric, str) else metric
        for name in asked or ():
            check_choice("metric", name, METRICS)
        target = self._target(prompt, run=self._run.at(snapshots.last_snapshot(self._run.run)), **options)
        run = target.opened.run
        found = snapshot_steps(run)
        steps = sorted({*found[::every], found[-1]})
        names = list(dict.fromkeys(asked or DEFAULT_METRICS))
        texts, names, source = snapshots.choose_texts(target, names, is_asked=asked is not None)
        if "copying" in names:
            texts = replace(texts, averaged=target.occurring_tokens)
            source += f"; copying over {target.averaged_over}"
        curve = [(point.step, point.loss) for point in read_history(run.metrics_path).training]

        def compute(model: "Transformer") -> "Dynamics":
            def load(step: int) -> "Transformer":
                return snapshots.load_snapshot(target, step, model)

            def emit(done: int) -> None:
                if progress is not None:
                    progress(done, len(steps))

            return follow(steps, load, names, texts, curve, emit, from_scratch=not run.record.parent)

        spanned = f"{len(steps)} snapshots, steps {steps[0]:,} to {steps[-1]:,}"
        return analyze("dynamics", target, compute, draw_dynamics, f"{spanned}; {source}" if source else spanned)

    def diff(
        self,
        other: "OpenedRun | str | Path",
        prompt: Prompt = None,
        *,
        across_layers: bool = False,
        batches: int = 4,
        batch_size: int = 32,
        **options: Unpack[Options],
    ) -> "Analysis[ModelDiff]":
        """What is different in another run, or another checkpoint: predictions, layers, heads and weights.

        Without a text, over windows of the validation split of this run. If the tokenizers differ, only bits per byte
        and weights are compared.

        Args:
            other: An opened run, or what `lumiere.open` takes, such as `latest@500`.
            across_layers: Whether to match heads across layers.
            batches, batch_size: Validation windows to read.
        """
        from lumiere.data.dataset import document_sizes, tokenize_parts
        from lumiere.interpret.model_diff import diff_models, diff_texts
        from lumiere.report.figures.bars import draw_diff

        second = self._run.beside(other)
        target = self._target(prompt, other=second, **options)
        sides = target.opened, second.opened
        if len({(side.tokenizer.fingerprint, side.model.vocab_size) for side in sides}) == 1:
            sequences, source = target.batches(batches, batch_size)

            def compute(model: "Transformer") -> "ModelDiff":
                model_b = comparison.as_placed(second.opened.model, model)
                return diff_models(model, model_b, sequences, across_layers=across_layers)
        else:
            if across_layers:
                raise LumiereError("--across-layers needs models with the same tokenizer", "omit --across-layers")
            documents, source = comparison.choose_documents(target, batches * batch_size)
            splits = [tokenize_parts(documents, side.tokenizer) for side in sides]
            texts = [
                (split, document_sizes(documents, split, side.tokenizer))
                for split, side in zip(splits, sides, strict=True)
            ]

            def compute(model: "Transformer") -> "ModelDiff":
                return diff_texts(model, comparison.as_placed(second.opened.model, model), texts)

        return analyze("diff", target, compute, draw_diff, source)

    def report(self, *prompts: str | Sequence[int], seed: int = 0) -> "Report":
        """Everything about the model on one self-contained page.

        Args:
            prompts: Texts to explore. Default: two of the validation split, and repeated random tokens.
        """
        from lumiere.api.report import make_report

        return make_report(self._target(seed=seed), prompts)


def summary_inputs(target: InspectTarget, num_windows: int) -> "tuple[list[Batch], np.ndarray | None, str]":
    """Return validation windows, the count of each token in the training split, and their source.

    Without the corpus there are neither, and a note says so.
    """
    try:
        token_counts = count_tokens(target.corpus().splits["train"].ids, target.opened.model.vocab_size)
    except LumiereError as error:
        target.note(f"{error.message}: only the weights are summarized")
        return [], None, "weights alone"
    if num_windows == 0:
        return [], token_counts, "weights, and the training split's tokens"
    batch_size = min(BATCH_SIZE, num_windows)
    batches, source = target.drawn_batches(-(-num_windows // batch_size), batch_size)
    return batches, token_counts, source


def fit_bigram(target: InspectTarget) -> "BigramModel | None":
    """Fit the bigram model, which contains the unigram model, to the run's corpus; None, with a note, without it."""
    from lumiere.evaluation.ngrams import BigramModel

    try:
        split = target.corpus().splits["train"]
    except LumiereError as error:
        target.note(f"no baselines: {error.message}")
        return None
    return BigramModel.fit(split.ids, split.offsets, target.opened.config.tokenizer.vocab_size)
