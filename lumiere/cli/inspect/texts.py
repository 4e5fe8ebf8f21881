"""The text that an analysis looks at, as token ids, and words that say where it comes from."""

from pathlib import Path

from lumiere.cli.evaluate import read_text
from lumiere.cli.loading import OpenedModel
from lumiere.errors import LumiereError

DEFAULT_TOKENS = 32
"""Tokens of the validation split that are shown where no text is given: what fits on a screen."""


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
        return repeated_tokens(opened, random, seed), f"{random} random tokens, twice (seed {seed})"
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
    from lumiere.data.tokenizer import SOT

    if not prompt.strip():
        raise LumiereError("the prompt is empty", "give it some text, or leave it out for the validation split")
    tokens = (SOT, *opened.tokenizer.encode(prompt))
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
    from lumiere.data.tokenizer import SOT

    text = read_text(file)
    if not text.strip():
        raise LumiereError(f"{str(file)!r} holds no text", "give a file with some")
    tokens = (SOT, *opened.tokenizer.encode(text))
    shown = tokens[: opened.config.model.context_size]
    return shown, str(file) if len(shown) == len(tokens) else f"{file}, its first {len(shown)} of {len(tokens)} tokens"


def repeated_tokens(opened: OpenedModel, length: int, seed: int) -> tuple[int, ...]:
    """The first of `repeated_sequences`."""
    return repeated_sequences(opened, length, 1, seed)[0]


def repeated_sequences(opened: OpenedModel, length: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """`count` times the start token and `length` different random tokens, twice.

    Raises:
        LumiereError: if that is longer than the context, or the vocabulary has fewer tokens.
    """
    import torch

    from lumiere.data.tokenizer import SOT, SPECIAL_TOKENS

    longest = min((opened.config.model.context_size - 1) // 2, len(opened.tokenizer) - len(SPECIAL_TOKENS))
    if length > longest:
        raise LumiereError(f"{length} random tokens twice do not fit the model", f"it has room for {longest}")
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for _ in range(count):
        drawn = torch.randperm(len(opened.tokenizer) - len(SPECIAL_TOKENS), generator=generator)[:length]
        once = (drawn + len(SPECIAL_TOKENS)).tolist()
        sequences.append((SOT, *once, *once))
    return sequences


def validation_window(opened: OpenedModel, number: int) -> tuple[int, ...]:
    """The inputs of a window of the run's validation split.

    Raises:
        LumiereError: if there is no such window, or the corpus is not there.
    """
    import numpy as np

    from lumiere.cli.loading import open_corpus

    corpus = open_corpus(opened, "restore it as it was, or give a text with --prompt or --file")
    windows = corpus.windows("validation", opened.config)
    if number >= len(windows):
        raise LumiereError(
            f"there is no window {number} in the validation split", f"its windows are 0 to {len(windows) - 1}"
        )
    tokens, lengths = windows.cut(np.array([number]))
    return tuple(tokens[0, : min(int(lengths[0]), opened.config.model.context_size)].tolist())
