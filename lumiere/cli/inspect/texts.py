"""The text that an analysis looks at, as token ids, and words that say where it comes from."""

from pathlib import Path
from typing import TYPE_CHECKING

from lumiere.errors import LumiereError
from lumiere.persistence.loading import OpenedModel

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

DEFAULT_TOKENS = 32
"""Tokens of the validation split that are shown where no text is given: what fits on a screen."""
MOST_SCORED = 2**17
"""Tokens of the validation split for the in-context-learning score and the natural repeats."""
MOST_COUNTED = 10_000_000
"""Tokens of the training split, its first ones, in which those that random tokens are drawn from have to occur."""


def choose_text(
    opened: OpenedModel,
    prompt: str | None,
    file: Path | None,
    window: int | None,
    random: int | None,
    seed: int,
) -> tuple[tuple[int, ...], str]:
    """The ids to look at and where they come from; without any choice always the same start of a validation window.

    Raises:
        LumiereError: if several are given, or the one that is given is empty or does not fit the model.
    """
    given = {"--prompt": prompt, "--file": file, "--val": window, "--random": random}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise LumiereError(f"{' and '.join(chosen)} are two texts", "choose one")
    if prompt is not None:
        return prompt_tokens(opened, prompt), "prompt"
    if file is not None:
        return file_tokens(opened, file)
    if random is not None:
        rows, origin = repeated_sequences(opened, random, 1, seed)
        return rows[0], f"{random} random tokens {origin}, twice (seed {seed})"
    tokens = validation_window(opened, window or 0)
    name = opened.config.dataset.name
    if window is None:
        return tokens[:DEFAULT_TOKENS], f"start of the validation split of {name}"
    return tokens, f"window {window} of the validation split of {name}"


def prompt_tokens(opened: OpenedModel, prompt: str) -> tuple[int, ...]:
    """The start token and the prompt's ids.

    Raises:
        LumiereError: if the prompt is empty or longer than the context.
    """
    from lumiere.data.text import plain

    if not prompt.strip():
        raise LumiereError("the prompt is empty", "give it some text, or leave it out for the validation split")
    tokens = tuple(opened.tokenizer.encode(plain(prompt), start=True))
    context_size = opened.config.model.context_size
    if len(tokens) > context_size:
        raise LumiereError(
            f"the prompt has {len(tokens)} tokens with its start token, the model sees {context_size}",
            "shorten it; lumiere tokenize CONFIG --text shows how a text is split",
        )
    return tokens


def file_tokens(opened: OpenedModel, file: Path) -> tuple[tuple[int, ...], str]:
    """The start token and as many of the file's ids as the context holds; the words say what was left out.

    Raises:
        LumiereError: if the file cannot be read, or holds no text.
    """
    from lumiere.data.text import read_text

    text = read_text(file)
    if not text.strip():
        raise LumiereError(f"{str(file)!r} holds no text", "give a file with some")
    tokens = tuple(opened.tokenizer.encode(text, start=True))
    shown = tokens[: opened.config.model.context_size]
    return shown, str(file) if len(shown) == len(tokens) else f"{file}, its first {len(shown)} of {len(tokens)} tokens"


def repeated_sequences(
    opened: OpenedModel, length: int | None, count: int, seed: int, at_most: int | None = None
) -> tuple[list[tuple[int, ...]], str]:
    """`count` times the start token and `length` different random tokens, twice; and of what the tokens are.

    Args:
        length: None takes as many as fit the model, but not more than `at_most`.
        at_most: None takes `COPY_LENGTH`.

    Raises:
        LumiereError: if that is longer than the context, or there are fewer tokens to draw from.
    """
    import torch

    from lumiere.data.tokenizer import SOT
    from lumiere.interpret.head_scores import COPY_LENGTH, longest_copy, repeated_tokens

    drawable, origin = drawable_tokens(opened)
    longest = longest_copy(opened.model, len(drawable))
    if longest < 1:
        raise LumiereError(
            f"a context of {counted_tokens(opened.model.context_size)} has no room for random tokens that come twice",
            "they need model.context_size=3 or more",
        )
    length = min(COPY_LENGTH if at_most is None else at_most, longest) if length is None else length
    if length > longest:
        raise LumiereError(f"{length} random tokens twice do not fit the model", f"it has room for {longest}")
    places = repeated_tokens(len(drawable), length, count, seed, start=len(drawable), first=0)
    return [tuple(row) for row in torch.tensor([*drawable, SOT])[places].tolist()], origin


def counted_tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count:,} tokens"


def drawable_tokens(opened: OpenedModel) -> tuple[list[int], str]:
    """The ids that random tokens are drawn from, special ones left out, and words that say which these are."""
    from lumiere.data.tokenizer import SPECIAL_TOKENS

    found, ordinary = occurring_tokens(opened), range(len(SPECIAL_TOKENS), len(opened.tokenizer))
    if found is None:
        return list(ordinary), "of the vocabulary"
    return [token for token in found if token in ordinary], "of the training split"


def averaged_tokens(opened: OpenedModel) -> tuple[list[int] | None, str]:
    """The ids over which centered logits and copying average, and words that say which these are.

    Without the corpus they are all ids: None.
    """
    found = occurring_tokens(opened)
    if found is None:
        return None, f"all {opened.model.vocab_size:,} tokens, since the training split is not there"
    return found, f"the {len(found):,} tokens that occur in the training split"


def occurring_tokens(opened: OpenedModel) -> list[int] | None:
    """The ids that occur in the training split; None without the corpus.

    A model has learned of the others, such as most single bytes, only that they never occur.
    """
    from lumiere.cli.inspect.vocabulary import count_tokens
    from lumiere.persistence.loading import open_corpus

    try:
        ids = open_corpus(opened, "restore it as it was").splits["train"].ids
    except LumiereError:
        return None
    return count_tokens(ids[:MOST_COUNTED], opened.model.vocab_size).nonzero()[0].tolist()


def validation_window(opened: OpenedModel, number: int) -> tuple[int, ...]:
    """The inputs of a window of the run's validation split.

    Raises:
        LumiereError: if there is no such window, or the corpus is not there.
    """
    import numpy as np

    from lumiere.persistence.loading import open_corpus

    corpus = open_corpus(opened, "restore it as it was, or give a text with --prompt or --file")
    windows = corpus.windows("validation", opened.config)
    if number >= len(windows):
        raise LumiereError(
            f"there is no window {number} in the validation split", f"its windows are 0 to {len(windows) - 1}"
        )
    tokens, lengths = windows.cut(np.array([number]))
    return tuple(tokens[0, : min(int(lengths[0]), opened.config.model.context_size)].tolist())


def spread_windows(opened: OpenedModel, most_tokens: int = MOST_SCORED) -> "tuple[Tensor, np.ndarray]":
    """(N, context_size + 1) ids of windows spread evenly over the validation split, and (N,) their documents.

    All of them, or as many as have `most_tokens` tokens; `<|pad|>` after the end of a document.

    Raises:
        LumiereError: if the corpus is not there.
    """
    import numpy as np
    import torch

    from lumiere.persistence.loading import open_corpus

    windows = open_corpus(opened, "restore it as it was").windows("validation", opened.config)
    count = min(max(1, most_tokens // windows.context_size), len(windows))
    chosen = np.linspace(0, len(windows) - 1, count).round().astype(np.int64)
    return torch.from_numpy(windows.cut(chosen)[0]), windows.documents(chosen)


def full_windows(opened: OpenedModel, count: int) -> "Tensor":
    """(N, context_size + 1) ids: at most `count` windows without padding, spread evenly over the validation split.

    Raises:
        LumiereError: if the corpus is not there, or no document fills a window.
    """
    import numpy as np
    import torch

    from lumiere.persistence.loading import open_corpus

    windows = open_corpus(opened, "restore it as it was").windows("validation", opened.config)
    # Most documents end in a window that is not full; a split may be too large to cut it all.
    tried = np.unique(np.linspace(0, len(windows) - 1, min(4 * count, len(windows))).round().astype(np.int64))
    tokens, lengths = windows.cut(tried)
    full = tokens[lengths == tokens.shape[1]]
    if not len(full):
        raise LumiereError("no document of the validation split seems to fill a window", "train with a smaller context")
    return torch.from_numpy(full[np.linspace(0, len(full) - 1, min(count, len(full))).round().astype(int)])
