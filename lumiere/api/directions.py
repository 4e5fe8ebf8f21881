"""`run.inspect`: directions of the residual stream, read by probes and written by steering.

Importing this module loads neither torch nor numpy.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from lumiere.api.analysis import Analysis, analyze
from lumiere.api.labels import label_texts
from lumiere.api.options import Options, Prompt, RunAnalyses
from lumiere.api.target import Indices, InspectTarget, batch_of, parse_indices, parse_token
from lumiere.errors import DataError, LumiereError, given
from lumiere.files import read_file
from lumiere.persistence.directions import Direction, Origin, check_fits, check_name, load_direction

if TYPE_CHECKING:
    import numpy as np

    from lumiere.data.batches import Batch
    from lumiere.interpret.probe import Probe
    from lumiere.interpret.steering import Steering
    from lumiere.models.transformer import Transformer

MAX_BYTES = 2**24
PROMPT_TOKENS = 16
"""Of each validation window that serves as a prompt."""


class Directions(RunAnalyses):
    """Directions of a run's residual stream."""

    def probe(
        self,
        *,
        regex: str | None = None,
        property: str = "token",  # noqa: A002 (the name of the option)
        labels: str | Path | None = None,
        classes: int = 4,
        file: str | Path | None = None,
        split: str = "validation",
        windows: int = 300,
        layer: Indices = None,
        balanced: bool = False,
        save: str | Path | None = None,
        control_seeds: int = 5,
        seed: int = 0,
        verify: bool = False,
    ) -> "Analysis[Probe]":
        """Whether a property of a token can be read off the residual stream by a linear probe, and from which stage on.

        Args:
            regex: Classes: whether the token's text matches this regular expression. Default: which of the most
                frequent tokens it is.
            property: Of which token: token (itself), next-token or previous-token; or position, in equal ranges.
            labels: A file with one object a line: {"text": ..., "labels": [...]}, a label or null for each token.
            classes: Without `regex`: how many of the most frequent tokens to tell apart.
            file: A text file, in which blank lines separate documents. Default: windows of `split`.
            split: validation or train.
            windows: Windows to read at most.
            layer: Blocks after which the stream is read.
            balanced: Give all classes the same weight.
            save: Write the direction of a probe for two classes to this .safetensors file, for `steer`.
            control_seeds: How many control tasks.
        """
        from lumiere.interpret.probe import probe
        from lumiere.report.figures.probe import draw_probe

        found = self._target(seed=seed, verify=verify)
        layers = found.layers(layer)
        data, subject, source = label_texts(found, property, regex, labels, file, split, windows, classes)
        if save is not None:
            check_name(Path(save))
            if len(data.classes) != 2:
                raise LumiereError(
                    f"a direction tells two classes apart, and there are {len(data.classes)}",
                    "give --regex, or --classes 2",
                )
        analysis = analyze(
            "probe",
            found,
            lambda model: probe(model, data, subject, layers, balanced, seed, control_seeds),
            draw_probe,
            source,
        )
        if save is not None:
            result = analysis.result
            place = max(result.chosen - 1, 0)
            save_direction(f"probe: {subject}", layers[place], result.vector, result.stream_norms, found, Path(save))
        return analysis

    def steer(
        self,
        prompt: Prompt = None,
        *,
        positive: str | Path | None = None,
        negative: str | Path | None = None,
        token: int | str | None = None,
        direction: str | Path | None = None,
        layer: int | str | None = None,
        target: int | str | None = None,
        vs: int | str | None = None,
        prompts: str | Path | None = None,
        placebos: int = 20,
        batches: int = 2,
        batch_size: int = 8,
        save: str | Path | None = None,
        **options: Unpack[Options],
    ) -> "Analysis[Steering]":
        """How the predictions change if a direction is added to the residual stream, beside random directions.

        The direction is the difference between the means of two sets of texts, a token's unembedding, or of a file.

        Args:
            positive, negative: Files with one text a line.
            token: The direction is this token's row of the unembedding, less that of `vs`.
            direction: A file that this method or `probe` has saved.
            layer: The block after which it is added. Default: the file's; the last for a token; else the middle one.
            target, vs: What is measured: the log-probability of `target`, or its logit minus that of `vs`.
            prompts: A file with one prompt a line. Default: the text; without one, starts of validation windows.
            placebos: Random directions of each kind.
            batches, batch_size: Validation windows on which the loss is measured.
            save: Write the direction to this .safetensors file.
        """
        from lumiere.interpret.steering import Sets, mean_norms, steer, text_means
        from lumiere.report.figures.steering import draw_steering

        given_sets = positive is not None or negative is not None
        ways = given({"--positive": given_sets, "--token": token, "--direction": direction})
        if len(ways) != 1 or (positive is None) != (negative is None):
            raise LumiereError(
                "steer needs one direction",
                "give --positive FILE and --negative FILE, --token TOKEN, or --direction FILE",
            )
        if placebos < 2:
            raise LumiereError(f"{placebos} placebos are no comparison", "20 is the default")
        if save is not None:
            check_name(Path(save))
        found = self._target(prompt, **options)
        opened = found.opened
        last, first = opened.model.num_layers - 1, found.num_start
        wanted = parse_token(token if target is None and token is not None else required(target), opened.tokenizer)
        other = None if vs is None else parse_token(vs, opened.tokenizer)
        if wanted == other:
            raise LumiereError(f"--target and --vs are the same token, {wanted}", "choose two different tokens")
        read, default, method = None, last // 2, ""
        texts: list[list[tuple[int, ...]]] = []
        if direction is not None:
            read = load_direction(Path(direction))
            check_fits(read, opened, Path(direction))
            default, method = read.origin.layer, f"{read.origin.method}, of {direction}"
        elif positive is not None and negative is not None:
            texts = [file_texts(found, Path(file), first) for file in (positive, negative)]
            method = f"difference of means of {len(texts[0]):,} and {len(texts[1]):,} texts"
        else:
            default, method = last, f"unembedding of {found.label(parse_token(required(token), opened.tokenizer))}"
        (chosen,) = parse_indices(default if layer is None else layer, last + 1, "layer")[:1]
        rows, source = prompt_rows(found, prompts)
        windows, of_windows = other_text(found, batches, batch_size, rows)
        metric = f"log-probability of {found.label(wanted)}"
        if other is not None:
            metric = f"logit of {found.label(wanted)} minus that of {found.label(other)}"
        of_token = None if token is None else parse_token(token, opened.tokenizer)

        def compute(model: "Transformer") -> "Steering":
            sets = None
            if texts:
                means = [text_means(model, side, first)[:, chosen] for side in texts]
                sets = Sets(*means)
                vector = sets.difference
            elif of_token is not None:
                matrix = model.readout()[0]
                vector = matrix[of_token] if other is None else matrix[of_token] - matrix[other]
            else:
                assert read is not None
                vector = read.vector
            norms = mean_norms(model, windows, first)
            return steer(
                model, vector, chosen, rows, wanted, other, windows if of_windows else (), norms, sets, method,
                metric, placebos, found.seed, first,
            )  # fmt: skip

        source = f"{source}; loss on {of_windows}" if of_windows else source
        analysis = analyze("steer", found, compute, draw_steering, source, method=method)
        if save is not None:
            result = analysis.result
            save_direction(result.method, result.layer, result.vector, result.stream_norms, found, Path(save))
        return analysis


def save_direction(
    method: str, layer: int, vector: "np.ndarray", norms: "np.ndarray", found: InspectTarget, path: Path
) -> None:
    """Write a direction of the target's model to a file."""
    import torch

    opened = found.opened
    hashes = opened.weights_sha256, opened.tokenizer.fingerprint
    origin = Origin(method, layer, opened.run.name, opened.checkpoint, *hashes)
    Direction(torch.from_numpy(vector), torch.from_numpy(norms), origin).save(path)


def required(token: int | str | None) -> int | str:
    """Return the token that is measured.

    Raises:
        LumiereError: None is given.
    """
    if token is None:
        raise LumiereError(
            "steer needs a token to measure", "give --target TOKEN, and --vs TOKEN for a logit difference"
        )
    return token


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank.

    Raises:
        LumiereError: It cannot be read, or has none.
    """
    from lumiere.data.text import decode, plain

    try:
        text = plain(decode(read_file(path, MAX_BYTES), str(path)))
    except OSError as error:
        raise LumiereError(f"{path} cannot be read: {error.strerror}", "check the path") from None
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError(f"{path} holds no text", "write one text a line")
    return lines


def file_texts(found: InspectTarget, path: Path, first: int = 0) -> list[tuple[int, ...]]:
    """Return the texts of a file as ids, each with more than `first` tokens."""
    rows = [found.prompt_tokens(line) for line in read_lines(path)]
    return [row for row in rows if len(row) > first]


def prompt_rows(found: InspectTarget, prompts: str | Path | None) -> tuple[list[tuple[int, ...]], str | None]:
    """Return prompts as ids and their source; None if it is the one text."""
    if prompts is not None:
        if found.given is not None:
            raise LumiereError(f"--prompts and --{found.given} are two texts", "choose one")
        rows = file_texts(found, Path(prompts))
        return rows, f"{len(rows):,} prompts of {prompts}"
    if found.given is not None:
        return [found.tokens], None
    (batch,), source = found.drawn_batches(1, PROMPT_TOKENS, ", or give prompts with --prompt or --prompts")
    rows = [tuple(row[real].tolist())[:PROMPT_TOKENS] for row, real in zip(batch.tokens, batch.is_real, strict=True)]
    return rows, f"starts of {source}"


def other_text(
    found: InspectTarget, batches: int, batch_size: int, rows: Sequence[tuple[int, ...]]
) -> "tuple[list[Batch], str]":
    """Return validation windows and what they are; without the corpus the prompts, and an empty text."""
    try:
        return found.drawn_batches(batches, batch_size)
    except LumiereError as error:
        found.note(f"no loss on other text: {error.message}")
        return [batch_of([row]) for row in rows if len(row) > 1 + found.num_start], ""
