"""`lumiere generate`: prompts in, text or JSON out, or an interactive session."""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Exit, Option

from lumiere.api.runs import DEFAULT_TEMPERATURE
from lumiere.api.steering import CHECKED_TOKENS, open_steering
from lumiere.cli.console import CHECK_FAILED, print_error, print_json, show_note, stdout
from lumiere.cli.options import CheckpointName, Device, Json, RunOption, RunsDir, open_model
from lumiere.errors import LumiereError, check_choice, given, nearest, printable, refuse_both
from lumiere.files import parse_json, read_file

if TYPE_CHECKING:
    from lumiere.generation.decoding import Limits, Piece, Token
    from lumiere.generation.sampling import Sampling
    from lumiere.generation.text import Generation, TextGenerator

MAX_BYTES = 100_000_000
JOINERS = "\u200c\u200d"  # zero-width characters that words and emoji need
SHADES = ((0.5, "green"), (0.2, "cyan"), (0.05, "yellow"), (0.01, "magenta"), (0.0, "bold red"))
"""Lowest probability of each color."""
WHOLE_NUMBERS = ("top_k", "no_repeat_ngram_size", "max_new_tokens", "seed")

SESSION_HELP = """\
some text        continue it; Ctrl-C stops the text
an empty line    continue the last text
/set NAME VALUE  change a setting: /set temperature 0.7, /set top_k none
/settings        show all settings
/history         show the texts of this session
/help            show this list
/quit            end the session, as Ctrl-D does"""
SESSION_COMMANDS = ("/set", "/settings", "/history", "/help", "/quit")


def generate(
    prompt: Annotated[
        str | None, Option("--prompt", "-p", metavar="TEXT", help="Text to continue; - reads stdin.")
    ] = None,
    prompts: Annotated[
        Path | None,
        Option(metavar="FILE", help='One prompt a line, or .jsonl with {"prompt": ...}. Prints JSON Lines.'),
    ] = None,
    interactive: Annotated[
        bool, Option("--interactive", "-i", help="Read prompts in a session; /help lists its commands.")
    ] = False,
    run: RunOption = "latest",
    checkpoint: CheckpointName = "best",
    max_new_tokens: Annotated[
        int, Option("--max-new-tokens", "-n", metavar="N", min=1, help="Generate at most N tokens.")
    ] = 200,
    temperature: Annotated[
        float | None,
        Option("--temperature", "-t", metavar="T", help="Divide logits by T; 0 is greedy. \\[default: 0.8]"),
    ] = None,
    top_k: Annotated[int | None, Option(metavar="K", help="Sample from the K most probable tokens.")] = None,
    top_p: Annotated[
        float | None, Option(metavar="P", help="Sample from the smallest set of tokens whose probabilities sum to P.")
    ] = None,
    min_p: Annotated[
        float | None, Option(metavar="P", help="Drop tokens less probable than P times the most probable one.")
    ] = None,
    typical_p: Annotated[
        float | None, Option(metavar="P", help="Sample from the most typical tokens that hold probability P.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, Option(metavar="X", help="Penalize tokens of the text so far if above 1.")
    ] = None,
    no_repeat_ngram_size: Annotated[
        int | None, Option(metavar="N", help="Never generate the same n-gram of N tokens twice.")
    ] = None,
    stop: Annotated[list[str] | None, Option(metavar="TEXT", help="Stop before this text. Repeatable.")] = None,
    num_return_sequences: Annotated[int, Option(metavar="N", min=1, help="Generate N texts for each prompt.")] = 1,
    seed: Annotated[int | None, Option(metavar="N", min=0, help="Seed the sampling, to repeat a text.")] = None,
    greedy: Annotated[bool, Option("--greedy", help="Always take the most probable token.")] = False,
    num_beams: Annotated[int | None, Option(metavar="N", min=2, help="Use beam search with N beams.")] = None,
    batch_size: Annotated[int, Option(metavar="N", min=1, help="Generate N texts at a time.")] = 64,
    logprobs: Annotated[
        int | None,
        Option(
            min=0,
            metavar="N",
            help="Print each token's log-probability and the N most probable tokens. They are the model's own: at "
            "temperature 1, before any other control, normalized over the tokens that can be generated.",
        ),
    ] = None,
    color: Annotated[bool, Option("--color", help="Color each token by its probability.")] = False,
    check: Annotated[
        bool, Option("--check", help="Compare the KV cache with full forward passes; exit 3 if they differ.")
    ] = False,
    steer: Annotated[
        str | None,
        Option(
            metavar="FILE[@L][*S]",
            help="Add a direction of `inspect steer` or `probe` after block L, of S times the mean norm there; exit 3 "
            "if it does not act everywhere. \\[default: the file's layer, 0.1]",
        ),
    ] = None,
    compile_step: Annotated[bool, Option("--compile", help="Use torch.compile, which needs a C++ compiler.")] = False,
    device: Device = "auto",
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Generate text from a trained model, streaming to stdout.

    Without a prompt, the model starts a new document.

    Example: [bold]lumiere generate --prompt "Once upon a time" --temperature 0.7 --top-k 40[/]
    """
    several = {"--num-return-sequences": num_return_sequences > 1}
    controls = {"--top-k": top_k, "--top-p": top_p, "--min-p": min_p, "--typical-p": typical_p}
    refuse_both({"--prompt": prompt, "--prompts": prompts, "--interactive": interactive})
    if num_beams is not None:
        unused = {"--temperature": temperature, **controls, "--seed": seed, "--greedy": greedy, "--stop": stop}
        refuse_useless("beam search", unused | {"--logprobs": logprobs, "--color": color})
    elif greedy or temperature == 0:
        refuse_useless("greedy decoding", {"--temperature": temperature if greedy else None} | controls)
    if interactive:
        whole = {"--num-beams": num_beams, "--logprobs": logprobs, "--check": check, "--json": as_json}
        refuse_both({"--interactive": True} | whole | several)
    if color:
        refuse_both({"--color": True, "--json": as_json, "--prompts": prompts, "--logprobs": logprobs} | several)

    from lumiere.generation.decoding import Limits
    from lumiere.generation.sampling import Sampling
    from lumiere.generation.text import TextGenerator

    if greedy:
        temperature = 0.0
    elif temperature is None:
        temperature = DEFAULT_TEMPERATURE
    sampling = Sampling(temperature, top_k, top_p, min_p, typical_p, repetition_penalty, no_repeat_ngram_size)
    settings = Settings(sampling, Limits(max_new_tokens, tuple(stop or ()), 0 if color else logprobs), seed)
    texts = read_prompts(prompts) if prompts is not None else [read_prompt(prompt)]
    opened = open_model(run, checkpoint, device, runs_dir)
    steering = None if steer is None else open_steering(steer, opened)
    generator = TextGenerator(opened.model, opened.tokenizer, compile_step, show_note, steering)
    if interactive:
        Session(generator, settings, color).run()
        check_steering(generator, None, steer)
        return
    output = Output(generator, settings, color, with_tokens=logprobs is not None)
    if num_beams is None and not (as_json or prompts or num_return_sequences > 1):
        shown = [output.stream(texts[0])]
    else:
        if num_beams is not None:
            search = (num_beams, sampling, max_new_tokens, num_return_sequences)
            generations = chain.from_iterable(generator.search(text, *search) for text in texts)
        else:
            batches = (seed, num_return_sequences, batch_size)
            generations = generator.write_many(texts, sampling, settings.limits, *batches)
        shown = output.show(generations, as_lines=prompts is not None, as_json=as_json)
    if check:
        checks = [generator.check(generation) for generation in shown]
        worst = max(checks, key=lambda check: check.difference)
        show_note(
            f"check {'passed' if worst.holds else 'FAILED'}: {sum(check.num_steps for check in checks):,} cached steps "
            f"against full forward passes, largest logit error {worst.difference:.0e} (tolerance {worst.tolerance:.0e})"
        )
        if not worst.holds:
            raise Exit(CHECK_FAILED)
    check_steering(generator, shown[0], steer)


def check_steering(generator: "TextGenerator", generation: "Generation | None", steer: str | None) -> None:
    """Say where steering acted, and exit with 3 if that is not everywhere or not as in full forward passes."""
    steering = generator.steering
    if steering is None:
        if steer is not None:
            show_note("scale 0: the text is that of the model as it is")
        return
    acted, expected = steering.num_edits, steering.num_expected
    text = f"steering acted at {acted:,} of {expected:,} positions x layers"
    holds = steering.holds
    if generation is not None:
        check = generator.check(generation, CHECKED_TOKENS)
        holds = holds and check.holds
        text += (
            f"; {check.num_steps} cached steps against full forward passes, largest logit error "
            f"{check.difference:.0e} (tolerance {check.tolerance:.0e})"
        )
    show_note(text if holds else f"FAILED: {text}")
    if not holds:
        raise Exit(CHECK_FAILED)


def refuse_useless(method: str, options: Mapping[str, object]) -> None:
    """Raise `LumiereError` if the user set one of the options, which have no effect with this method."""
    if useless := given(options):
        raise LumiereError(f"{useless[0]} has no effect with {method}", "leave it out")


def read_prompt(prompt: str | None) -> str | None:
    """Return the prompt; `-` reads stdin, without its last line end."""
    from lumiere.data.text import decode, plain

    if prompt != "-":
        return None if prompt is None else plain(prompt)
    return decode(sys.stdin.buffer.read(MAX_BYTES), "stdin").removesuffix("\n")


def read_prompts(path: Path) -> list[str]:
    """Read one prompt from each line that is not blank; from its key `prompt` if the file is .jsonl.

    Raises:
        LumiereError: The file cannot be read, holds no prompt, or has a line without one.
    """
    from lumiere.data.text import decode, plain

    try:
        text = decode(read_file(path, MAX_BYTES), str(path))
    except OSError as error:
        raise LumiereError(f"{path} cannot be read: {error.strerror}", "check the path") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise LumiereError(f"{path} holds no prompt", "write one prompt a line")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    prompts = []
    for number, line in lines:
        try:
            record = parse_json(line)
            prompt = record.get("prompt") if isinstance(record, dict) else None
            if not isinstance(prompt, str):
                raise ValueError("it has no text under the key 'prompt'")
            if not prompt.strip():
                raise ValueError("the prompt is empty")
        except ValueError as error:
            hint = 'each line is an object such as {"prompt": "Once upon a time"}'
            raise LumiereError(f"{path}, line {number}: {error}", hint) from None
        prompts.append(plain(prompt))
    return prompts


@dataclass(frozen=True)
class Settings:
    """What a session can change, under the names of the options."""

    sampling: "Sampling"
    limits: "Limits"
    seed: int | None

    @property
    def values(self) -> dict[str, Any]:
        limits = {"max_new_tokens": self.limits.max_new_tokens, "stop": self.limits.stop}
        return vars(self.sampling) | limits | {"seed": self.seed}

    def stream(self, generator: "TextGenerator", prompt: str | None) -> "Iterator[Piece]":
        return generator.stream(prompt, self.sampling, self.limits, self.seed)

    def changed(self, name: str, text: str) -> "Settings":
        """Return the settings with one value read from `text`; `none` turns a control off.

        Raises:
            LumiereError: No such setting, or an invalid value.
        """
        name = name.replace("-", "_")
        check_choice("setting", name, self.values)
        value = {name: parse_setting(name, text)}
        if name == "seed":
            return replace(self, **value)
        if name in vars(self.limits):
            return replace(self, limits=replace(self.limits, **value))
        return replace(self, sampling=replace(self.sampling, **value))


def parse_setting(name: str, text: str) -> Any:
    if name == "stop":  # with escapes such as \n
        return () if text == "none" else (text.encode("latin-1", "backslashreplace").decode("unicode_escape"),)
    if text == "none" and name not in ("temperature", "max_new_tokens"):
        return None
    try:
        return int(text) if name in WHOLE_NUMBERS else float(text)
    except ValueError:
        raise LumiereError(f"{name} must be a number, not '{text}'", "for example /set temperature 0.7") from None


@dataclass(frozen=True)
class Output:
    """Print generations as text, as colored text, as a table of tokens, or as JSON.

    Attributes:
        color: Whether to color tokens by their probability.
        with_tokens: Whether to show tokens and their probabilities.
    """

    generator: "TextGenerator"
    settings: Settings
    color: bool
    with_tokens: bool

    def stream(self, prompt: str | None) -> "Generation":
        """Generate one text and print it token by token."""
        from lumiere.generation.text import generation_of

        pieces: list[Piece] = []
        for piece in self.settings.stream(self.generator, prompt):
            if self.with_tokens:
                self._write_tokens(filter(None, [piece.token]))
            else:
                write("" if pieces else prompt or "")
                write_piece(piece, self.color)
            pieces.append(piece)
            sys.stdout.flush()
        write("" if self.with_tokens else "\n")
        return generation_of(prompt, pieces, self.settings.seed)

    def show(self, generations: "Iterable[Generation]", as_lines: bool, as_json: bool) -> "list[Generation]":
        """Print generations as JSON Lines, as one JSON list, or as texts between separator lines."""
        shown: list[Generation] = []
        for generation in generations:
            shown.append(generation)
            if as_lines:
                print_json(self._record(generation), indent=None)
                sys.stdout.flush()
            elif not as_json:
                write("\n---\n\n" if len(shown) > 1 else "")
                if self.with_tokens:
                    self._write_tokens(generation.tokens)
                else:
                    write((generation.prompt or "") + generation.text + "\n")
        if as_json and not as_lines:
            print_json([self._record(generation) for generation in shown])
        return shown

    def _write_tokens(self, tokens: "Iterable[Token]") -> None:
        """Print each token, its log-probability and probability, and the alternatives."""
        label = self.generator.tokenizer.label
        for token in tokens:
            logprob = float("nan") if token.logprob is None else token.logprob
            parts = [f"{label(token.id):16} {logprob:8.3f} {math.exp(logprob):6.1%}"]
            parts += [f"{label(other)} {math.exp(logprob):.1%}" for other, logprob in token.alternatives]
            write("  ".join(parts) + "\n")

    def _record(self, generation: "Generation") -> dict[str, Any]:
        """Return a generation as JSON values."""

        def choice(token: int, logprob: float | None) -> dict[str, Any]:
            return {"id": token, "token": self.generator.tokenizer.label(token), "logprob": logprob}

        record: dict[str, Any] = {
            "prompt": generation.prompt,
            "text": generation.text,
            "finish_reason": generation.finish_reason,
            "num_tokens": len(generation.tokens),
        }
        optional = {"seed": generation.seed, "score": generation.score}
        record |= {name: value for name, value in optional.items() if value is not None}
        if self.with_tokens:
            record["tokens"] = [
                choice(token.id, token.logprob) | {"alternatives": [choice(*other) for other in token.alternatives]}
                for token in generation.tokens
            ]
        return record


def write_piece(piece: "Piece", color: bool) -> None:
    """Print a piece of text, on a terminal in the color of its last token's probability."""
    if not (color and piece.text and sys.stdout.isatty()):
        write(piece.text)
        return
    from rich.text import Text

    logprob = None if piece.token is None else piece.token.logprob
    style = "" if logprob is None else next(style for least, style in SHADES if math.exp(logprob) >= least)
    stdout().print(Text(printable(piece.text, keep="\n\t" + JOINERS), style=style), end="")


def write(text: str) -> None:
    """Print `text` as it is to a file or pipe, without control characters to a terminal."""
    sys.stdout.write(printable(text, keep="\n\t" + JOINERS) if sys.stdout.isatty() else text)


@dataclass
class Session:
    """Read prompts and commands from stdin until it ends."""

    generator: "TextGenerator"
    settings: Settings
    color: bool
    texts: list[str] = field(default_factory=list)

    def run(self) -> None:
        with suppress(ImportError):  # absent on Windows, whose terminal has a history of its own
            import readline  # noqa: F401 (gives `input` arrow keys and a history)
        show_note("enter a prompt; /help lists the commands, Ctrl-D ends the session")
        while True:
            try:
                line = input("> ")
                if line.strip() == "/quit":
                    return
                self._answer(line)
            except EOFError:
                write("\n")
                return
            except KeyboardInterrupt:
                write("\n")
                show_note("/quit or Ctrl-D ends the session")
            except LumiereError as error:
                print_error(error)

    def _answer(self, line: str) -> None:
        match line.split(maxsplit=2):
            case []:
                self._write(None)
            case [word, *_] if not word.startswith("/"):
                self._write(line)
            case ["/set", name, value]:
                self.settings = self.settings.changed(name, value)
            case ["/set", *_]:
                raise LumiereError("/set needs a name and a value", "for example /set temperature 0.7")
            case ["/settings", *_]:
                for name, value in self.settings.values.items():
                    write(f"{name:21} {value}\n")
            case ["/history", *_]:
                for number, text in enumerate(self.texts, start=1):
                    write(f"{number}. {text}\n")
            case ["/help", *_]:
                write(SESSION_HELP + "\n")
            case [command, *_]:
                guess = nearest(command, SESSION_COMMANDS)
                hint = f"did you mean {guess}?" if guess else "/help lists the commands"
                raise LumiereError(f"there is no command {command}", hint)

    def _write(self, prompt: str | None) -> None:
        """Continue `prompt`, or the last text if it is None. Ctrl-C stops the text, not the session."""
        from lumiere.data.text import plain

        continues = prompt is None and bool(self.texts)
        text = self.texts[-1] if continues else plain(prompt or "")
        pieces = self.settings.stream(self.generator, text or None)
        if continues:
            self.texts.pop()
        try:
            write(text)
            for piece in pieces:
                text += piece.text
                write_piece(piece, self.color)
                sys.stdout.flush()
        except KeyboardInterrupt:
            show_note(" stopped")
        finally:
            self.texts.append(text)
        write("\n")
