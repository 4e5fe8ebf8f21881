"""`lumiere generate`."""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lumiere.cli.console import print_error, print_json, show_note, stdout
from lumiere.cli.loading import open_model
from lumiere.cli.options import CheckpointName, Device, Json, RunOption, RunsDir
from lumiere.errors import LumiereError, nearest, printable
from lumiere.files import parse_json, read_file

if TYPE_CHECKING:
    from lumiere.generation.decoding import Limits, Piece, Token
    from lumiere.generation.sampling import Sampling
    from lumiere.generation.text import Generation, TextGenerator


FAILED_CHECK = 3


def generate(
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="The beginning; - reads stdin. Without it the model begins by itself.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="FILE", help="A prompt a line, or .jsonl with a key prompt; the answer is JSON Lines."
        ),
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="A session: a prompt a line, /help for the rest.")
    ] = False,
    run: RunOption = "latest",
    checkpoint: CheckpointName = "best",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest text, in tokens.")
    ] = 200,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", help="0 takes the likeliest token. \\[default: 0.8]")
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Draw from the likeliest tokens that hold this probability.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option("--min-p", help="Leave out tokens below this share of the likeliest one's probability."),
    ] = None,
    typical_p: Annotated[
        float | None, typer.Option("--typical-p", help="Draw from the most typical tokens that hold this probability.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1: what was said becomes less likely.")
    ] = None,
    no_repeat_ngram_size: Annotated[
        int | None, typer.Option("--no-repeat-ngram-size", help="No so many tokens in a row come twice.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text. Repeatable.")
    ] = None,
    num_return_sequences: Annotated[
        int, typer.Option("--num-return-sequences", min=1, help="Texts for each prompt.")
    ] = 1,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="The same seed gives the same text.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    num_beams: Annotated[
        int | None,
        typer.Option("--num-beams", min=2, help="Search for the likeliest text with so many beams, and draw nothing."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts that are made at once.")] = 64,
    logprobs: Annotated[
        int | None,
        typer.Option(
            "--logprobs",
            min=0,
            metavar="N",
            help="Print each token's log-probability and the N most probable tokens: the model's own, at temperature 1 "
            "and before every other control, normalized over all tokens that can be generated.",
        ),
    ] = None,
    color: Annotated[bool, typer.Option("--color", help="Shade each token by its probability.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare the cache with full forward passes; exit 3 if they differ.")
    ] = False,
    compile_step: Annotated[
        bool, typer.Option("--compile", help="Through torch.compile; needs a C++ compiler.")
    ] = False,
    device: Device = "auto",
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Let a model write, and print the text as it comes.

    Example: [bold]lumiere generate --prompt "Once upon a time" --temperature 0.7 --top-k 40[/]
    """
    drawing = {
        "--temperature": temperature,
        "--top-k": top_k,
        "--top-p": top_p,
        "--min-p": min_p,
        "--typical-p": typical_p,
        "--seed": seed,
    }
    sources = given({"--prompt": prompt, "--prompts": prompts, "--interactive": interactive})
    refuse_both(*sources)
    refuse_useless(drawing, greedy, num_beams, {"--stop": stop, "--logprobs": logprobs, "--color": color})
    if interactive:
        session_only = {"--num-beams": num_beams, "--logprobs": logprobs, "--check": check, "--json": as_json}
        refuse_both("--interactive", *given(session_only | {"--num-return-sequences": num_return_sequences > 1}))
    if color:
        others = {"--json": as_json, "--prompts": prompts, "--logprobs": logprobs}
        refuse_both("--color", *given(others | {"--num-return-sequences": num_return_sequences > 1}))

    from lumiere.cli.console import show_note
    from lumiere.generation.text import TextGenerator

    settings = Settings(
        temperature=0.0 if greedy else 0.8 if temperature is None else temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
        seed=seed,
    )
    settings.check()
    texts = read_prompts(prompts) if prompts is not None else [read_prompt(prompt)]
    opened = open_model(run, checkpoint, device, runs_dir)
    generator = TextGenerator(opened.model, opened.tokenizer, compile_step, show_note)
    if interactive:
        Session(generator, settings, color).run()
        return

    output = Output(generator, settings, logprobs, color)
    if num_beams is not None:
        generations = output.search(texts, num_beams, num_return_sequences)
    elif as_json or prompts is not None or num_return_sequences > 1:
        generations = output.write_many(texts, num_return_sequences, batch_size)
    else:
        generations = iter([output.stream(texts[0])])
    shown = output.show(generations, as_lines=prompts is not None, as_json=as_json)
    if check and not output.check(shown):
        raise typer.Exit(FAILED_CHECK)


def refuse_both(*options: str) -> None:
    """Options of which one alone makes sense with the first.

    Raises:
        LumiereError: there are two.
    """
    if len(options) > 1:
        raise LumiereError(f"{options[0]} and {options[1]} do not go together", "leave one of them out")


def refuse_useless(
    drawing: dict[str, object], greedy: bool, num_beams: int | None, streaming: dict[str, object]
) -> None:
    """Options that would have no effect.

    Raises:
        LumiereError: there are some.
    """
    named = given(drawing)
    if num_beams is not None and (useless := [*named, *given({"--greedy": greedy}), *given(streaming)]):
        raise LumiereError(
            f"beam search draws nothing and has whole texts only, so {useless[0]} has no effect", "leave it out"
        )
    is_greedy = greedy or drawing["--temperature"] == 0
    if is_greedy and (useless := [name for name in named if name != "--temperature" or greedy]):
        useless = [name for name in useless if name != "--seed"]
        if useless:
            raise LumiereError(f"greedy takes the likeliest token, so {useless[0]} has no effect", "leave it out")


MAX_BYTES = 100_000_000


def read_prompt(prompt: str | None) -> str | None:
    """The prompt itself, or all of stdin where it is `-`, without the line end that it closes with."""
    from lumiere.data.text import decode, plain

    if prompt != "-":
        return None if prompt is None else plain(prompt)
    return decode(sys.stdin.buffer.read(MAX_BYTES), "stdin").removesuffix("\n")


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file, one a line; blank lines are none. A line of a .jsonl is an object with a key `prompt`.

    Raises:
        LumiereError: it cannot be read, is no such file, or holds no prompt.
    """
    from lumiere.data.text import decode

    try:
        text = decode(read_file(path, MAX_BYTES), str(path))
    except OSError as error:
        raise LumiereError(f"{path} cannot be read: {error.strerror}", "check the path") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise LumiereError(f"{path} holds no prompt", "write one a line")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    return [_prompt_of(line, f"{path}, line {number}") for number, line in lines]


def _prompt_of(line: str, place: str) -> str:
    hint = 'each line is an object such as {"prompt": "Once upon a time"}'
    from lumiere.data.text import plain

    try:
        record = parse_json(line)
    except ValueError as error:
        raise LumiereError(f"{place}: {error}", hint) from None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise LumiereError(f"{place} has no text under the key prompt", hint)
    if not prompt.strip():
        raise LumiereError(f"{place}: the prompt is empty", "give it some text")
    return plain(prompt)


@dataclass(frozen=True)
class Settings:
    """As on the command line."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    max_new_tokens: int
    stop: tuple[str, ...]
    seed: int | None

    @property
    def sampling(self) -> "Sampling":
        from lumiere.generation.sampling import Sampling

        return Sampling(**{field.name: getattr(self, field.name) for field in fields(Sampling)})

    def limits(self, num_logprobs: int | None = None) -> "Limits":
        from lumiere.generation.decoding import Limits

        return Limits(self.max_new_tokens, self.stop, num_logprobs)

    def check(self) -> None:
        """Raises LumiereError: a value is out of range."""
        _ = self.sampling, self.limits()

    def changed(self, name: str, text: str) -> "Settings":
        """The settings with one of them read from `text`; `none` leaves a control out.

        Raises:
            LumiereError: there is no such setting, or it cannot have this value.
        """
        name = name.replace("-", "_")
        kinds = {field.name: field.type for field in fields(self)}
        if name not in kinds:
            guess = nearest(name, kinds)
            hint = f"did you mean {guess}?" if guess else f"there are {', '.join(kinds)}"
            raise LumiereError(f"there is no setting '{name}'", hint)
        settings = replace(self, **{name: _value(name, kinds[name], text)})
        settings.check()
        return settings


def _value(name: str, kind: Any, text: str) -> Any:
    if name == "stop":
        # As a shell would write it: \n is a line end.
        return () if text == "none" else (text.encode("latin-1", "backslashreplace").decode("unicode_escape"),)
    if text == "none" and kind not in (int, float):
        return None
    try:
        return (float if kind in (float, float | None) else int)(text)
    except ValueError:
        raise LumiereError(f"{name} must be a number, not '{text}'", "for example /set temperature 0.7") from None


def given(options: Mapping[str, object]) -> list[str]:
    """The names of the options that were given."""
    return [name for name, value in options.items() if value not in (None, False, [], ())]


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


HELP = """\
a line of text   the model goes on from it; Ctrl-C stops the text
an empty line    the model goes on from where it stopped
/set NAME VALUE  change a setting: /set temperature 0.7, /set top_k none
/settings        all settings
/history         the texts of this session
/help            this list
/quit            leave; so does Ctrl-D"""
COMMANDS = ("/set", "/settings", "/history", "/help", "/quit")


class Session:
    """Reads lines from stdin until there are no more.

    Args:
        settings: to begin with.
        color: whether tokens are shaded by their probability.
    """

    def __init__(self, generator: "TextGenerator", settings: "Settings", color: bool) -> None:
        self._generator = generator
        self._settings = settings
        self._color = color
        self._texts: list[str] = []

    def run(self) -> None:
        with suppress(ImportError):  # Windows has none, and a history of its own
            import readline  # noqa: F401 (its import gives `input` arrow keys and a history)
        show_note("a prompt a line; /help lists the commands, Ctrl-D ends the session")
        while True:
            try:
                line = input("> ")
            except EOFError:
                write("\n")
                return
            except KeyboardInterrupt:
                write("\n")
                show_note("/quit or Ctrl-D ends the session")
                continue
            try:
                if line.strip() == "/quit":
                    return
                self._answer(line)
            except LumiereError as error:
                print_error(error)

    def _answer(self, line: str) -> None:
        command, *words = line.split(maxsplit=2) or [""]
        if not command.startswith("/"):
            self._write(line if command else None)
        elif command == "/set" and len(words) == 2:
            self._settings = self._settings.changed(*words)
        elif command == "/set":
            raise LumiereError("/set takes a name and a value", "for example /set temperature 0.7")
        elif command == "/settings":
            for field in fields(self._settings):
                write(f"{field.name:21} {getattr(self._settings, field.name)}\n")
        elif command == "/history":
            for number, text in enumerate(self._texts, start=1):
                write(f"{number}. {text}\n")
        elif command == "/help":
            write(HELP + "\n")
        else:
            guess = nearest(command, COMMANDS)
            raise LumiereError(
                f"there is no command {command}", f"did you mean {guess}?" if guess else "/help lists them"
            )

    def _write(self, prompt: str | None) -> None:
        """Go on from `prompt`, or from the last text where there is none; an interrupt ends the text alone."""
        from lumiere.data.text import plain

        goes_on = prompt is None and bool(self._texts)
        text = self._texts[-1] if goes_on else plain(prompt or "")
        limits = self._settings.limits(0 if self._color else None)
        pieces = self._generator.stream(text or None, self._settings.sampling, limits, self._settings.seed)
        if goes_on:
            self._texts.pop()
        try:
            write(text)
            for piece in pieces:
                text += piece.text
                if self._color and piece.text:
                    show_shaded(piece.text, piece.token)
                else:
                    write(piece.text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            show_note(" stopped")
        finally:
            self._texts.append(text)
        write("\n")
