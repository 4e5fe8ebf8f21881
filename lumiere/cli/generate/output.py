"""What a model writes, as text, shaded, as a list of tokens, or as JSON."""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lumiere.cli.console import print_json, show_note, stdout
from lumiere.errors import printable

if TYPE_CHECKING:
    from lumiere.cli.generate.settings import Settings
    from lumiere.generation.decoding import Piece, Token
    from lumiere.generation.text import Generation, TextGenerator

JOINERS = "\u200c\u200d"  # they have no shape, and belong to words and to emoji
# Probability from which on a token is shaded so; from surprising to certain.
SHADES = ((0.5, "green"), (0.2, "cyan"), (0.05, "yellow"), (0.01, "magenta"), (0.0, "bold red"))


class Output:
    """One way to write and to show.

    Args:
        num_logprobs: alternatives to show beside each token, or None.
        color: whether to shade tokens.
    """

    def __init__(self, generator: "TextGenerator", settings: "Settings", num_logprobs: int | None, color: bool) -> None:
        self._generator = generator
        self._settings = settings
        self._num_logprobs = num_logprobs
        self._color = color
        self._is_shown = False

    def stream(self, prompt: str | None) -> "Generation":
        """Write one text and print it as it comes."""
        from lumiere.generation.text import generation_of

        limits = self._settings.limits(0 if self._color else self._num_logprobs)
        pieces: list[Piece] = []
        for piece in self._generator.stream(prompt, self._settings.sampling, limits, self._settings.seed):
            if not pieces:
                self._begin(prompt)
            pieces.append(piece)
            self._print(piece)
            sys.stdout.flush()
        if self._num_logprobs is None:
            write("\n")
        self._is_shown = True
        return generation_of(prompt, pieces, self._settings.seed)

    def write_many(
        self, prompts: Sequence[str | None], num_return_sequences: int, batch_size: int
    ) -> "Iterator[Generation]":
        limits = self._settings.limits(self._num_logprobs)
        return self._generator.write_many(
            prompts, self._settings.sampling, limits, self._settings.seed, num_return_sequences, batch_size
        )

    def search(
        self, prompts: Sequence[str | None], num_beams: int, num_return_sequences: int
    ) -> "Iterator[Generation]":
        for prompt in prompts:
            yield from self._generator.search(
                prompt, num_beams, self._settings.sampling, self._settings.max_new_tokens, num_return_sequences
            )

    def show(self, generations: "Iterable[Generation]", as_lines: bool, as_json: bool) -> "list[Generation]":
        """Print what is not printed yet: as JSON Lines, as one JSON list, or as texts with a line between them."""
        shown: list[Generation] = []
        for generation in generations:
            shown.append(generation)
            if as_lines:
                print_json(self._record(generation), indent=None)
                sys.stdout.flush()
            elif not as_json and not self._is_shown:
                if len(shown) > 1:
                    write("\n---\n\n")
                self._show_text(generation)
        if as_json and not as_lines:
            print_json([self._record(generation) for generation in shown])
        return shown

    def check(self, generations: "Sequence[Generation]") -> bool:
        """Whether the cache gave what full forward passes give, with a line of talk about it."""
        checks = [self._generator.check(generation) for generation in generations]
        worst = max(checks, key=lambda check: check.difference)
        steps = sum(check.num_steps for check in checks)
        verdict = "holds" if worst.holds else "FAILED"
        show_note(
            f"check {verdict}: {steps:,} cached steps beside full forward passes, logits off by "
            f"{worst.difference:.0e} (allowed {worst.allowed:.0e})"
        )
        return worst.holds

    def _begin(self, prompt: str | None) -> None:
        if self._num_logprobs is None:
            write(prompt or "")

    def _print(self, piece: "Piece") -> None:
        if self._num_logprobs is not None:
            if piece.token is not None:
                write(self._line(piece.token) + "\n")
        elif self._color and piece.text:
            show_shaded(piece.text, piece.token)
        else:
            write(piece.text)

    def _show_text(self, generation: "Generation") -> None:
        if self._num_logprobs is None:
            write((generation.prompt or "") + generation.text + "\n")
        else:
            for token in generation.tokens:
                write(self._line(token) + "\n")

    def _line(self, token: "Token") -> str:
        """A token, its probability, and the alternatives'."""
        label = self._generator.tokenizer.label
        own = float("nan") if token.logprob is None else token.logprob
        parts = [f"{label(token.id):16} {own:8.3f} {math.exp(own):6.1%}"]
        parts += [f"{label(other)} {math.exp(logprob):.1%}" for other, logprob in token.alternatives]
        return "  ".join(parts)

    def _record(self, generation: "Generation") -> dict[str, Any]:
        record: dict[str, Any] = {
            "prompt": generation.prompt,
            "text": generation.text,
            "finish_reason": generation.finish_reason,
            "num_tokens": len(generation.tokens),
        }
        if generation.seed is not None:
            record["seed"] = generation.seed
        if generation.score is not None:
            record["score"] = generation.score
        if self._num_logprobs is not None:
            label = self._generator.tokenizer.label
            record["tokens"] = [
                {
                    "id": token.id,
                    "token": label(token.id),
                    "logprob": token.logprob,
                    "alternatives": [
                        {"id": other, "token": label(other), "logprob": logprob}
                        for other, logprob in token.alternatives
                    ],
                }
                for token in generation.tokens
            ]
        return record


def show_shaded(text: str, token: "Token | None") -> None:
    """A piece of text in the shade of its last token's probability, where there is a terminal."""
    from rich.text import Text

    if not sys.stdout.isatty():
        write(text)
        return

    style = ""
    if token is not None and token.logprob is not None:
        style = next(style for least, style in SHADES if math.exp(token.logprob) >= least)
    stdout().print(Text(printable(text, keep="\n\t" + JOINERS), style=style), end="")


def write(text: str) -> None:
    """`text` as it is to a file or a pipe; a terminal is not to be steered by what a model was taught to write."""
    sys.stdout.write(printable(text, keep="\n\t" + JOINERS) if sys.stdout.isatty() else text)
