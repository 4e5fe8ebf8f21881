"""Clean and corrupt prompts of an analysis: two texts, or a file of pairs.

Importing this module loads neither torch nor numpy.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumiere.api.options import Prompt
from lumiere.api.target import InspectTarget, parse_indices, parse_token
from lumiere.errors import DataError, LumiereError, check_choice, quoted
from lumiere.files import parse_json, read_file

if TYPE_CHECKING:
    from lumiere.interpret.prompts import PromptPairs

MAX_BYTES = 2**24
KEYS = ("clean", "corrupt", "target", "vs", "group")
TokenName = int | str | None
"""An id, a text that is one token, or a token as it is printed."""


@dataclass(frozen=True)
class Pair:
    """One pair of prompts, as ids; `group` is any name."""

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    target: int | None
    versus: int | None
    group: Any = None


def read_pairs(
    found: InspectTarget,
    corrupt: Prompt = None,
    target: TokenName = None,
    vs: TokenName = None,
    pairs: str | Path | None = None,
    position: int | str = -1,
) -> "tuple[PromptPairs, str | None]":
    """Return pairs of prompts, and their source; None for the source if the clean one is the text of `found`.

    Args:
        found: With the clean prompt as its text, or no text, and then `pairs`.
        corrupt: The corrupt prompt.
        target, vs: The token that the clean prompt should predict, and one to compare it with. Those of a file come
            before these.
        pairs: A file with one JSON object a line: {"clean": ..., "corrupt": ..., "target": ..., "vs": ...,
            "group": ...}. The prompts are texts, or lists of ids; the last three may be missing.
        position: Where predictions are read.

    Raises:
        LumiereError: There are not two prompts, or the file is damaged; the prompts do not align, token by token; a
            token is none; or some lines have a target and others do not.
    """
    from lumiere.interpret.prompts import check_pair, pair_up

    tokenizer = found.opened.tokenizer
    token = {name: None if given is None else parse_token(given, tokenizer) for name, given in
             (("target", target), ("vs", vs))}  # fmt: skip
    if pairs is not None:
        if found.given is not None or corrupt is not None:
            raise LumiereError("--pairs and a prompt exclude each other", "use one of them")
        read = list(file_pairs(Path(pairs), found, token))
        source = f"{len(read):,} pair{'s' * (len(read) > 1)} of {pairs}"
    else:
        if found.given is None or corrupt is None:
            raise LumiereError(
                "this analysis compares two prompts", "give --prompt TEXT and --corrupt TEXT, or --pairs FILE.jsonl"
            )
        read, source = [Pair(found.tokens, found.prompt_tokens(corrupt), token["target"], token["vs"])], None
        check_pair(read[0].clean, read[0].corrupt, found.label)
    (where,) = parse_indices(position, len(read[0].clean), "position")
    names = list(dict.fromkeys(map(str, (pair.group for pair in read))))
    return pair_up(
        [pair.clean for pair in read],
        [pair.corrupt for pair in read],
        in_all(read, "target", lambda pair: pair.target),
        in_all(read, "vs", lambda pair: pair.versus),
        where,
        None if all(pair.group is None for pair in read) else [names.index(str(pair.group)) for pair in read],
        found.label,
    ), source


def in_all(read: list[Pair], name: str, value: Callable[[Pair], int | None]) -> list[int] | None:
    """Return a token of each pair; None if no pair has one."""
    tokens = [value(pair) for pair in read]
    present = [token for token in tokens if token is not None]
    if len(present) not in (0, len(tokens)):
        raise LumiereError(f"{len(present)} of {len(tokens)} pairs have a {name!r}", "give one to all of them, or none")
    return present or None


def file_pairs(path: Path, found: InspectTarget, default: Mapping[str, int | None]) -> Iterator[Pair]:
    """Yield the pairs of a file; errors name the line."""
    from lumiere.interpret.prompts import check_pair

    try:
        lines = read_file(path, MAX_BYTES).splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", "check the path") from None
    length = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            pair = read_pair(line, found, default)
            check_pair(pair.clean, pair.corrupt, found.label)
            if length not in (None, len(pair.clean)):
                raise LumiereError(
                    f"the prompts have {len(pair.clean)} tokens, those before {length}", "give pairs of one length"
                )
        except LumiereError as error:
            raise DataError(f"{path}, line {number}: {error.message}", error.hint) from None
        length = len(pair.clean)
        yield pair
    if length is None:
        raise DataError(f"{path} contains no pairs", 'each line is {"clean": "...", "corrupt": "..."}')


def read_pair(line: bytes, found: InspectTarget, default: Mapping[str, int | None]) -> Pair:
    """Return the pair of one line."""
    try:
        values = parse_json(line)
    except ValueError as error:
        raise LumiereError(f"this is no JSON: {error}", 'write {"clean": "...", "corrupt": "..."}') from None
    if not isinstance(values, dict):
        raise LumiereError(f"{quoted(values)} is no pair", 'write {"clean": "...", "corrupt": "..."}')
    for key in values:
        check_choice("key", key, KEYS)
    tokens = dict(default)
    for key in ("target", "vs"):
        if (value := values.get(key)) is not None:
            if isinstance(value, bool) or not isinstance(value, int | str):
                raise LumiereError(f"{key} is {quoted(value)}", "write a token as a text, or its id")
            tokens[key] = parse_token(value, found.opened.tokenizer)
    clean, corrupt = (prompt_of(values, key, found) for key in ("clean", "corrupt"))
    return Pair(clean, corrupt, tokens["target"], tokens["vs"], values.get("group"))


def prompt_of(values: Mapping[str, Any], key: str, found: InspectTarget) -> tuple[int, ...]:
    """Return the ids of a prompt of a line."""
    value = values.get(key)
    if isinstance(value, str) or (isinstance(value, list) and all(type(token) is int for token in value)):
        return found.prompt_tokens(value)
    problem = f"{key} is missing" if value is None else f"{key} is {quoted(value)}"
    raise LumiereError(problem, "write a text, or a list of token ids")
