"""Prompts from the command line, from stdin and from files."""

import sys
from pathlib import Path

from lumiere.errors import LumiereError
from lumiere.files import parse_json, read_file

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
