"""Try a stranger's tokenizer in a child process, which may hang, panic or take all memory without harm.

    python -m lumiere.data.tokenizer_probe BYTES < tokenizer.json

The texts it tries cannot cover every pattern; they include long runs of each character that a pattern names, on which
patterns such as `(a+)+$` backtrack forever.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from lumiere.data.checksums import cache_dir
from lumiere.errors import DataError, printable, shortened

SECONDS = 10
MAX_MEMORY = 2 * 10**9
RUN_LENGTH = 2000
MAX_SPECIAL = 1000
SAMPLES = (
    "The city of London is the capital of the United Kingdom.",
    "  two  spaces,\ttabs\n\nline ends \r\n\n",
    "0123456789 1,234.56 2026-11-28 x² ½",
    "def f(x):\n    return x**2  # square\n",
    "Ünïcödé e\u0301 日本語 العربية 🎉 👩\u200d👩\u200d👧",
    "<s> </s> <|endoftext|> <|im_start|> [INST] <unk> <pad>",
)
RUNS = "aA1 \n\t.é日_"


def probe(text: str, name: str) -> None:
    """Try a tokenizer, once per contents: what passed is remembered in the cache.

    Args:
        text: The contents of its `tokenizer.json`.
        name: The file, for errors.

    Raises:
        DataError: It fails, takes more than `SECONDS`, or needs more than `MAX_MEMORY` bytes.
    """
    marker = cache_dir() / "tokenizers" / hashlib.sha256(text.encode()).hexdigest()
    if marker.exists():
        return
    command = [sys.executable, "-m", __name__, str(MAX_MEMORY)]
    settings = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=SECONDS, env=settings)
    except subprocess.TimeoutExpired:
        problem = f"{name!r} cannot be used as a tokenizer: it takes more than {SECONDS} s for short texts"
        raise DataError(problem, "one of its patterns may never end; use another tokenizer") from None
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["it crashes, or takes more than 2 GB"]
        reason = shortened(printable(lines[-1]))
        raise DataError(f"{name!r} cannot be used as a tokenizer: {reason}", "use another tokenizer")
    with contextlib.suppress(OSError):  # without a writable cache, it is tried again
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()


def main() -> None:
    """Read a tokenizer from stdin and use it; exit with 1 and a reason if it fails."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no limits, macOS does not keep this one
        import resource

        limit = int(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        try_out(sys.stdin.buffer.read().decode())
    except BaseException as error:  # a panic of the library is no Exception
        print(f"{type(error).__name__}: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(1)


def try_out(text: str) -> None:
    """Encode and decode `SAMPLES` and runs of characters.

    Raises:
        ValueError: The bytes of tokens do not join to the text that the library decodes, so that generated text could
            not be streamed; or text that spells a special token would become that token.
    """
    import tokenizers

    from lumiere.data.foreign_tokenizer import ForeignTokenizer, SpecialTokens

    contents = json.loads(text)
    tokenizer = ForeignTokenizer(text, SpecialTokens(None, ()))
    library = tokenizers.Tokenizer.from_str(text)
    named = {character for pattern in patterns(contents) for character in pattern}
    for sample in (*SAMPLES, *(character * RUN_LENGTH + end for character in sorted({*RUNS, *named}) for end in "!\n")):
        ids = tokenizer.encode(sample)
        ours, theirs = tokenizer.decode(ids), library.decode(ids)
        if ours != theirs:
            raise ValueError(f"its tokens spell {theirs[:40]!r}, joined they are {ours[:40]!r}")
    for special in list(tokenizer.special_tokens.values())[:MAX_SPECIAL]:
        unknown = contents["model"].get("unk_token"), contents["model"].get("unk_id")
        found = tokenizer.special_ids.intersection(tokenizer.encode(special))
        if any(token != unknown[1] and tokenizer.special_tokens[token] != unknown[0] for token in found):
            raise ValueError(f"text that spells {special} would become that token")


def patterns(value: Any) -> Iterator[str]:
    """Yield the regular expressions in a `tokenizer.json`."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "Regex" and isinstance(item, str):
                yield item
            elif key not in ("vocab", "merges"):
                yield from patterns(item)
    elif isinstance(value, list):
        for item in value:
            yield from patterns(item)


if __name__ == "__main__":
    main()
