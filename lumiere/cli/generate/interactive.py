"""`lumiere generate --interactive`: a prompt a line, with history and settings that can be changed."""

import sys
from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING

from lumiere.cli.console import print_error, show_note
from lumiere.cli.generate.output import show_shaded, write
from lumiere.errors import LumiereError, nearest

if TYPE_CHECKING:
    from lumiere.cli.generate.settings import Settings
    from lumiere.generation.text import TextGenerator

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
