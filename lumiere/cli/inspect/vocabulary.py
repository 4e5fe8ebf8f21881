"""Tokens as they are named on the command line and printed."""

from typing import TYPE_CHECKING

from lumiere.errors import LumiereError, nearest

if TYPE_CHECKING:
    import numpy as np

    from lumiere.data.tokenizer import Tokenizer

LONGEST_LIST = 8


def parse_token(text: str, tokenizer: "Tokenizer") -> int:
    """The id of the token that `text` names: an id in digits, a text that is one token, or a token as it is printed.

    Raises:
        LumiereError: there is no such id, or the text is not one token.
    """
    if text.isdecimal() and text.isascii():
        token = int(text)
        if token >= len(tokenizer):
            raise LumiereError(f"there is no token {text}", f"the ids are 0 to {len(tokenizer) - 1}")
        return token
    ids = tokenizer.encode(text)
    if len(ids) == 1:
        return ids[0]
    labels = [tokenizer.label(token) for token in range(len(tokenizer))]
    if text in labels:
        return labels.index(text)
    if not ids:
        raise LumiereError("an empty text is no token", "give a text that is one token, or an id")
    parts = " ".join(labels[token] for token in ids[:LONGEST_LIST]) + (" ..." if len(ids) > LONGEST_LIST else "")
    with_space = tokenizer.encode(f" {text}")
    guess = labels[with_space[0]] if len(with_space) == 1 else nearest(text, labels)
    hint = f"did you mean '{guess}'? · is a space" if guess else "give a text that is one token, or an id"
    raise LumiereError(f"{text!r} is {len(ids)} tokens: {parts}", hint)


def token_label(tokenizer: "Tokenizer", token: int) -> str:
    """The token as it is printed; an id that the tokenizer does not use, which a model may still predict, as #id."""
    return tokenizer.label(token) or f"#{token}"


def count_tokens(ids: "np.ndarray", vocab_size: int) -> "np.ndarray":
    """(vocab_size,) how often each id stands in `ids`, a part of them at a time: they may be larger than memory."""
    import numpy as np

    counts = np.zeros(vocab_size, dtype=np.int64)
    part = 1_000_000
    for first in range(0, len(ids), part):
        counts += np.bincount(ids[first : first + part], minlength=vocab_size)
    return counts
