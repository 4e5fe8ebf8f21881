"""`run.inspect.lens`: the logit lens, and lenses that are fitted to a checkpoint and kept with its run.

Importing this module loads neither torch nor numpy.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Unpack

from lumiere.api.analysis import Analysis, analyze, model_provenance
from lumiere.api.options import Options, Prompt, RunAnalyses
from lumiere.api.target import Indices, InspectTarget, parse_token
from lumiere.errors import LumiereError, check_choice
from lumiere.persistence import lenses as kept

if TYPE_CHECKING:
    from torch import Tensor

    from lumiere.interpret.lenses import Lens, LensComparison


STATISTICS = ("top", "probability", "rank", "entropy", "kl")
TRAINED = ("tuned", "jacobian")
"""Those of `lumiere.interpret.lenses`, whose import would load torch."""
LENSES = ("logit", *TRAINED)
TEXTS = {"tuned": 4096, "jacobian": 100}
"""Texts that a lens is fitted to by default."""
HELD_OUT = 32
TEXT_TOKENS = 128
"""Of the texts that a file is cut into."""

Progress = Callable[[int, int], None]


class Lenses(RunAnalyses):
    """Predictions from the residual stream before its end."""

    def lens(
        self,
        prompt: Prompt = None,
        *,
        stat: str = "top",
        sublayers: bool = False,
        target: int | str | None = None,
        pos: Indices = None,
        top_k: int = 5,
        lens: str = "logit",
        train: str | None = None,
        compare: bool = False,
        steps: int = 250,
        texts: int | None = None,
        progress: Progress | None = None,
        **options: Unpack[Options],
    ) -> "Analysis[Any]":
        """What the model would predict if it stopped early, by the logit lens or a fitted one.

        The result is a `LogitLens`; with `train` or `compare` it is a `LensComparison`.

        Args:
            stat: What the picture shows, one of `STATISTICS`.
            sublayers: Whether to add the stage after each block's attention; of the logit lens alone.
            target: Token to look for. Default: the next token of the text.
            pos: Positions of the text.
            top_k: Number of predictions to keep for each stage and position.
            lens: One of `LENSES`; `tuned` and `jacobian` must have been trained.
            train: Train this lens on the training split, or on a file; keep it with the run, and compare.
            compare: Compare the lenses that are kept with the run on held-out text.
            steps: Steps of training a tuned lens, at most.
            texts: Texts that a lens is fitted to. Default: 4,096, or 100 for a Jacobian lens.
            progress: Called with the number of steps of training done, and of all.
        """
        if train is not None or compare:
            return self._fitted(train, steps, texts, progress, prompt, **options)
        from lumiere.interpret.logit_lens import logit_lens
        from lumiere.report.figures.heat_maps import draw_lens

        check_choice("statistic", stat, STATISTICS)
        check_choice("lens", lens, LENSES)
        if sublayers and lens != "logit":
            raise LumiereError(f"--sublayers and --lens {lens}: it was not fitted to them", "omit --sublayers")
        found = self._target(prompt, **options)
        fitted = None if lens == "logit" else load_lens(found, lens)
        opened, tokens = found.opened, found.tokens
        if top_k > opened.model.vocab_size:
            raise LumiereError(f"--top-k {top_k} is too large", f"the vocabulary has {opened.model.vocab_size} tokens")
        positions = found.positions(pos)
        wanted = None if target is None else parse_token(target, opened.tokenizer)
        words = None if wanted is None else found.label(wanted)
        return analyze(
            "lens",
            found,
            lambda model: logit_lens(model, tokens, positions, sublayers, wanted, top_k, fitted),
            lambda result: draw_lens(result, stat, found.label, words, lens),
            lens=lens,
        )

    def _fitted(
        self,
        train: str | None,
        steps: int,
        texts: int | None,
        progress: Progress | None,
        prompt: Prompt,
        **options: Any,
    ) -> "Analysis[LensComparison]":
        """Train and keep a lens, if one is named, and compare all that are kept with the logit lens."""
        from lumiere.interpret.lenses import compare_lenses, jacobian_lens, no_progress, train_tuned
        from lumiere.report.figures.lenses import draw_lenses

        if train is not None:
            check_choice("lens to train", train, TRAINED)
        found = self._target(prompt, **options)
        if found.given not in (None, "file"):
            raise LumiereError(f"--{found.given} is one text, and a lens is fitted to many", "give --file, or no text")
        if steps < 1:
            raise LumiereError(f"--steps {steps} trains nothing", "give 1 or more")
        model, lenses = found.opened.model, {}
        if not model.num_layers:
            raise LumiereError("the model has no blocks", "nothing lies between the embeddings and the output")
        fitted_to, held_out, source = fitting_texts(found, texts or TEXTS.get(train or "", 0))
        if train == "tuned":
            tuned = train_tuned(model, fitted_to, held_out, steps, found.seed, progress=progress or no_progress)
            lenses["bias only"] = tuned.bias
            about = {
                "steps": tuned.steps,
                "curve": tuned.curve,
                "objective": "KL(final || lens), Adam, cosine schedule",
            }
            keep_lens(found, tuned.lens, source, about)
        elif train == "jacobian":
            lens = jacobian_lens(model, fitted_to, progress or no_progress)
            keep_lens(found, lens, source, {"variant": "mean over t of the sum over later positions t' >= t"})
        step = found.opened.step
        for kind in TRAINED:
            if kept.lens_path(found.opened.run, kind, step).exists():
                lenses[kind] = load_lens(found, kind)
        if not lenses:
            load_lens(found, "tuned")  # says that there is none
        return analyze(
            "lens",
            found,
            lambda model: compare_lenses(model, held_out.to(model.token_embedding.weight.device), lenses),
            draw_lenses,
            source,
            trained=train,
        )


def load_lens(target: InspectTarget, kind: str) -> "Lens":
    """Return the lens that is kept for the target's checkpoint; refuse one of other weights."""
    from lumiere.interpret.lenses import Lens

    opened = target.opened
    shape = (opened.model.num_layers, opened.model.embedding_size)
    tensors, _ = kept.load_lens(opened.run, kind, opened.step, opened.weights_sha256, shape)
    return Lens(kind, **tensors)


def keep_lens(target: InspectTarget, lens: "Lens", source: str, about: dict[str, Any]) -> None:
    """Store a lens with the target's run."""
    from lumiere import __version__

    opened = target.opened
    tensors = {"matrices": lens.matrices, "offsets": lens.offsets}
    kept.save_lens(
        opened.run,
        lens.kind,
        opened.step,
        {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()},
        {
            "lens": lens.kind,
            "lumiere_version": __version__,
            **model_provenance(opened),
            "source": source,
            "seed": target.seed,
            **about,
        },
    )


def fitting_texts(target: InspectTarget, count: int) -> "tuple[Tensor, Tensor, str]":
    """Return at most `count` texts to fit a lens to, others that are held out, and their source.

    The first are windows of the training split, the others of the validation split. Of a file they are parts of up to
    128 tokens, the last tenth of which is held out.
    """
    import torch

    device = target.opened.model.token_embedding.weight.device
    if target.given == "file":
        rows, source = file_rows(target)
        held_out = max(1, min(HELD_OUT, len(rows) // 10))
        fitted_to, others = rows[:-held_out][:count], rows[-held_out:]
    else:
        instead = ", or give a text with --file"
        others = target.full_windows(HELD_OUT, instead=instead)[:, :-1]
        fitted_to = target.full_windows(count, "train", instead)[:, :-1] if count else others[:0]
        name = target.opened.config.dataset.name
        source = f"windows of the training split of {name}; compared on {len(others)} of the validation split"
    if count:
        source = f"{len(fitted_to):,} {source}"
    return fitted_to.to(device, torch.int64), others.to(device, torch.int64), source


def file_rows(target: InspectTarget) -> "tuple[Tensor, str]":
    """Return the tokens of a file as texts of one length, (N, T)."""
    from pathlib import Path

    import torch

    from lumiere.data.text import read_text

    file = Path(target.text["file"])
    ids = target.opened.tokenizer.encode(read_text(file))
    size = min(TEXT_TOKENS, target.opened.context_size)
    count = len(ids) // size
    if count < 2:
        raise LumiereError(f"{str(file)!r} has {len(ids)} tokens, too few for a lens", f"give {2 * size} or more")
    return torch.tensor(ids[: count * size]).view(count, size), f"texts of {size} tokens of {file}"
