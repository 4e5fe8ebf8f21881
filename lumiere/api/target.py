"""What an analysis looks at: one or two models, and a text, validation windows or random tokens."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumiere.errors import LumiereError, nearest
from lumiere.persistence.loading import OpenedModel, open_corpus
from lumiere.persistence.tensor_files import available_memory

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lumiere.data.batches import Batch, Windows
    from lumiere.data.dataset import TokenizedCorpus
    from lumiere.data.tokenizer import Tokenizer
    from lumiere.interpret.head_scores import TextWindows
    from lumiere.models.transformer import Transformer

DEFAULT_TOKENS = 32
"""Tokens of the validation split that are shown without a text option: what fits on a screen."""
MAX_SCORED_TOKENS = 2**17
"""Validation tokens for the in-context-learning score and natural repeats."""
MAX_COUNTED_TOKENS = 10_000_000
"""Training tokens, from the start of the split, that are searched for the tokens that occur in training."""
MAX_LISTED_TOKENS = 8
PART = 1_000_000
"""Tokens that are counted at once."""

Indices = int | str | Sequence[int] | None
"""Layers, heads, neurons or positions: numbers, or a list such as `0,2-3`; None for all. -1 is the last."""


@dataclass(frozen=True)
class InspectTarget:
    """What an analysis looks at.

    Attributes:
        opened: the model with its run and its tokenizer.
        text: `prompt` (a text, or token ids), `file`, `val` or `random`, by these names; None for those not given.
        seed: of everything that is drawn at random.
        verify: whether the result is to be computed again in float64.
        other: the second model of a comparison.
        notify: receives notes about what is left out.
        notes: these notes.
    """

    opened: OpenedModel
    text: Mapping[str, Any]
    seed: int = 0
    verify: bool = False
    other: OpenedModel | None = None
    notify: Callable[[str], None] = lambda note: None
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Note what is left out, and why."""
        self.notes.append(text)
        self.notify(text)

    @cached_property
    def given(self) -> str | None:
        """The name of the text option in use; several are refused."""
        given = [name for name, value in self.text.items() if value is not None]
        if len(given) > 1:
            raise LumiereError(f"{' and '.join(f'--{name}' for name in given)} are two texts", "choose one")
        return given[0] if given else None

    @cached_property
    def chosen(self) -> tuple[tuple[int, ...], str]:
        """The ids of the text, and their source; without a text option, the start of a validation window."""
        value = self.text[self.given or "val"]
        split = f"the validation split of {self.opened.config.dataset.name}"
        match self.given:
            case "prompt":
                return self.prompt_tokens(value), "prompt" if isinstance(value, str) else "token ids"
            case "file":
                return self.file_tokens(Path(value))
            case "random":
                rows, origin = self.repeated_sequences(value, 1)
                return rows[0], f"{value} random tokens {origin}, twice (seed {self.seed})"
            case "val":
                return self.validation_window(value), f"window {value} of {split}"
            case _:
                return self.validation_window(0)[:DEFAULT_TOKENS], f"start of {split}"

    @property
    def tokens(self) -> tuple[int, ...]:
        """(T,) the ids of the text."""
        return self.chosen[0]

    @property
    def has_text(self) -> bool:
        """Whether the analysis has read one text, which is then printed with the result."""
        return "chosen" in self.__dict__

    @property
    def labels(self) -> list[str]:
        """(T,) the tokens as they are printed."""
        return [self.opened.tokenizer.label(token) for token in self.tokens]

    def label(self, token: int) -> str:
        """Return a token as it is printed; #id if the tokenizer does not use it, which a model may still predict."""
        return self.opened.tokenizer.label(token) or f"#{token}"

    def layers(self, given: Indices) -> list[int]:
        return parse_indices(given, self.opened.config.model.num_layers, "layer")

    def heads(self, given: Indices) -> list[int]:
        return parse_indices(given, self.opened.config.model.num_heads, "head")

    def positions(self, given: Indices) -> list[int]:
        return parse_indices(given, len(self.tokens), "position")

    def own_tokens(self, ids: Iterable[int]) -> tuple[int, ...]:
        """Return token ids as they are given; refuse those that the model has not, and more than the context holds."""
        tokens = tuple(map(int, ids))
        rows = self.opened.model.vocab_size
        if not tokens:
            raise LumiereError("there are no token ids", "give a text, or the ids of one")
        if wrong := [token for token in tokens if not 0 <= token < rows]:
            raise LumiereError(f"there is no token {wrong[0]}", f"the ids are 0 to {rows - 1}")
        self.check_length(tokens, "token ids")
        return tokens

    def check_length(self, tokens: Sequence[int], what: str) -> None:
        """Check that the model sees a text whole, and that its activations fit into the memory."""
        model, size = self.opened.config.model, self.opened.context_size
        if len(tokens) > size:
            wider = f" or --context-size {len(tokens)}" if len(tokens) <= model.context_size else ""
            hint = f"shorten it{wider}; lumiere tokenize CONFIG --text shows how a text is split"
            raise LumiereError(f"the {what} has {len(tokens)} tokens, the model sees {size}", hint)
        needed, available = activation_bytes(self.opened.model, len(tokens)), available_memory()
        if available is not None and needed > available:
            raise LumiereError(
                f"{len(tokens)} tokens take about {needed / 1e9:,.1f} GB, {available / 1e9:,.1f} GB are free",
                "give a shorter text, or free memory",
            )

    def prompt_tokens(self, prompt: str | Iterable[int]) -> tuple[int, ...]:
        """Return the start token and the prompt's ids; refuse an empty prompt, and one longer than the context.

        A prompt of ids is taken as it is, without a start token.
        """
        from lumiere.data.text import plain

        if not isinstance(prompt, str):
            return self.own_tokens(prompt)
        if not prompt.strip():
            raise LumiereError("the prompt is empty", "give a text, or omit --prompt to use the validation split")
        tokens = tuple(self.opened.tokenizer.encode(plain(prompt), start=True))
        self.check_length(tokens, "prompt")
        return tokens

    def file_tokens(self, file: Path) -> tuple[tuple[int, ...], str]:
        """Return the start token and as many of the file's ids as fit the context, and a source that says so."""
        from lumiere.data.text import read_text

        text = read_text(file)
        if not text.strip():
            raise LumiereError(f"{str(file)!r} contains no text", "give a file that contains text")
        tokens = tuple(self.opened.tokenizer.encode(text, start=True))
        shown = tokens[: self.opened.context_size]
        cut = "" if len(shown) == len(tokens) else f", its first {len(shown)} of {len(tokens)} tokens"
        return shown, f"{file}{cut}"

    def repeated_sequences(
        self, length: int | None, count: int, at_most: int | None = None
    ) -> tuple[list[tuple[int, ...]], str]:
        """Return `count` sequences of the start token and `length` different random tokens, twice, and their origin.

        Args:
            length: None: as many as fit the model, up to `at_most`.
            at_most: None: `COPY_LENGTH`.
        """
        import torch

        from lumiere.interpret.head_scores import COPY_LENGTH, longest_copy, repeated_tokens

        model, found = self.opened.model, self.occurring_tokens
        text_ids, start = self.opened.tokenizer.text_ids, self.opened.tokenizer.start_id
        drawable = sorted(set(found).intersection(text_ids))
        longest = longest_copy(model, len(drawable), self.num_start)
        if longest < 1:
            raise LumiereError(
                f"context_size {model.context_size} is too small for repeated random tokens",
                "repeated random tokens need model.context_size=3 or more",
            )
        length = min(at_most or COPY_LENGTH, longest) if length is None else length
        if length > longest:
            raise LumiereError(f"{length} random tokens twice do not fit the model", f"the maximum is {longest}")
        last = None if start is None else len(drawable)
        places = repeated_tokens(len(drawable), length, count, self.seed, start=last, first=0)
        rows = torch.tensor(drawable if start is None else [*drawable, start])[places].tolist()
        return list(map(tuple, rows)), "of the training split" if self.has_training_split else "of the vocabulary"

    @property
    def num_start(self) -> int:
        """The number of start tokens before a text: 0 or 1."""
        return int(self.opened.tokenizer.start_id is not None)

    def scored_sequences(self) -> "tuple[Tensor, str | None]":
        """Return the sequences that heads are scored on, (N, T), and their source; None if it is the one text.

        Without a text, or with --random, these are random tokens that come twice.
        """
        import torch

        from lumiere.interpret.head_scores import SEQUENCES

        if self.given not in (None, "random"):
            return torch.tensor([self.tokens]), None
        rows, origin = self.repeated_sequences(self.text["random"], SEQUENCES)
        number = f"{SEQUENCES} sequences of {len(rows[0]) // 2} random tokens"
        return torch.tensor(rows), f"{number} {origin}, twice (seed {self.seed})"

    @cached_property
    def has_training_split(self) -> bool:
        """Whether the text that the model was trained on is at hand."""
        try:
            self.corpus()
        except LumiereError:
            return False
        return True

    @cached_property
    def occurring_tokens(self) -> list[int]:
        """The ids that occur in the training split; without it, all that the tokenizer produces.

        All that a model has learned about the others, such as most single bytes, is that they never occur.
        """
        if not self.has_training_split:
            return self.opened.tokenizer.text_ids
        ids = self.corpus().splits["train"].ids
        return count_tokens(ids[:MAX_COUNTED_TOKENS], self.opened.model.vocab_size).nonzero()[0].tolist()

    @property
    def averaged_over(self) -> str:
        """Which tokens centered logits and copying average over."""
        count = f"{len(self.occurring_tokens):,} tokens"
        if self.has_training_split:
            return f"the {count} that occur in the training split"
        return f"all {count} of the tokenizer, since the training split is not there"

    def corpus(self, instead: str = "") -> "TokenizedCorpus":
        """Return the corpus that the run was trained on.

        Args:
            instead: what else the user can do if it is missing or has changed, for the hint.
        """
        return open_corpus(self.opened, f"restore it as it was{instead}")

    def validation_windows(self, instead: str = "") -> "Windows":
        return self.corpus(instead).windows("validation", self.opened.config)

    def validation_window(self, number: int) -> tuple[int, ...]:
        """Return the inputs of a window of the validation split."""
        import numpy as np

        windows = self.validation_windows(", or give a text with --prompt or --file")
        if number >= len(windows):
            raise LumiereError(
                f"there is no window {number} in the validation split", f"its windows are 0 to {len(windows) - 1}"
            )
        tokens, lengths = windows.cut(np.array([number]))
        return tuple(tokens[0, : min(int(lengths[0]), self.opened.config.model.context_size)].tolist())

    def spread_windows(self, max_tokens: int = MAX_SCORED_TOKENS) -> "TextWindows":
        """Return windows spread evenly over the validation split, of at most `max_tokens` tokens."""
        import numpy as np
        import torch

        from lumiere.components.kernels import IGNORED
        from lumiere.interpret.head_scores import TextWindows

        windows = self.validation_windows()
        chosen = spread(len(windows), min(max(1, max_tokens // windows.context_size), len(windows)))
        tokens, lengths = windows.cut(chosen)
        tokens[np.arange(tokens.shape[1]) >= lengths[:, None]] = IGNORED
        return TextWindows(torch.from_numpy(tokens), windows.documents(chosen), self.opened.tokenizer.special_ids)

    def spread_windows_if_any(self) -> "TextWindows | None":
        """Return `spread_windows` for the head scores on text; None, with a note, without the corpus."""
        try:
            return self.spread_windows()
        except LumiereError as error:
            self.note(f"no in-context-learning score and no scores on text: {error.message}")
            return None

    def full_windows(self, count: int, split: str = "validation", instead: str = "") -> "Tensor":
        """Return at most `count` windows without padding, (N, context_size + 1), spread over a split.

        Args:
            instead: as for `corpus`.
        """
        import numpy as np
        import torch

        windows = self.corpus(instead).windows(split, self.opened.config)
        # Most documents end in a window that is not full, and a split may be too large to read all of it.
        tokens, lengths = windows.cut(np.unique(spread(len(windows), min(4 * count, len(windows)))))
        full = tokens[lengths == tokens.shape[1]]
        if not len(full):
            raise LumiereError(
                f"no document of the {split} split seems to fill a window", "train with a smaller model.context_size"
            )
        return torch.from_numpy(full[spread(len(full), min(count, len(full)))])

    def batches(self, num_batches: int, batch_size: int) -> tuple[list["Batch"], str | None]:
        """Return batches of inputs and targets and their source; None if it is the one text.

        Without a text option, validation windows are drawn by the seed, without replacement. With `--random S`, there
        are as many sequences of S random tokens, twice; the targets are tokens 2 to S of the second copy.
        """
        if self.given is None:
            return self.drawn_batches(num_batches, batch_size, ", or give a text with --prompt, --file or --random")
        if self.given != "random":
            return [batch_of([self.tokens])], None
        from lumiere.interpret.head_scores import first_copied

        length, count = self.text["random"], num_batches * batch_size
        if length < 2:
            raise LumiereError(
                f"--random {length} leaves nothing to predict in the second copy", "give --random 2 or more"
            )
        sequences, origin = self.repeated_sequences(length, count)
        batches = [
            batch_of(sequences[first : first + batch_size], first_copied(length, self.num_start))
            for first in range(0, count, batch_size)
        ]
        return batches, (
            f"{count:,} x {length} random tokens {origin}, twice (seed {self.seed}), in {counted_batches(num_batches)};"
            f" loss of tokens 2 to {length} of the second copy"
        )

    def drawn_batches(self, num_batches: int, batch_size: int, instead: str = "") -> tuple[list["Batch"], str]:
        """Return windows of the validation split, drawn by the seed, and their source."""
        import numpy as np

        from lumiere.data.batches import make_batch, permute

        windows, name = self.validation_windows(instead), self.opened.config.dataset.name
        count = min(num_batches * batch_size, len(windows))
        drawn = permute(np.arange(count), len(windows), key=str(self.seed))
        batches = [make_batch(windows, part) for part in np.array_split(drawn, min(num_batches, count))]
        return batches, (
            f"{count:,} of {len(windows):,} windows of the validation split of {name} "
            f"(seed {self.seed}), in {counted_batches(len(batches))}"
        )


def activation_bytes(model: "Transformer", num_tokens: int) -> int:
    """Estimate the memory that an analysis of one text takes.

    Counts all activations, attention scores and patterns, and the logits four times.
    """
    settings, vocab_size = model.settings, model.vocab_size
    streams = num_tokens * (8 * settings.embedding_size + 3 * settings.d_ff)
    patterns = 2 * settings.num_heads * num_tokens**2
    size = model.token_embedding.weight.element_size()
    return size * (settings.num_layers * (streams + patterns) + 4 * num_tokens * vocab_size)


def parse_token(token: int | str, tokenizer: "Tokenizer") -> int:
    """Return the id of a token, named by its id, by a text that is one token, or by its printed form."""
    text = str(token)
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
        raise LumiereError("an empty text is not a token", "give a text that is one token, or an id")
    parts = " ".join(labels[token] for token in ids[:MAX_LISTED_TOKENS])
    with_space = tokenizer.encode(f" {text}")
    guess = labels[with_space[0]] if len(with_space) == 1 else nearest(text, labels)
    raise LumiereError(
        f"{text!r} is {len(ids)} tokens: {parts}{' ...' if len(ids) > MAX_LISTED_TOKENS else ''}",
        f"did you mean '{guess}'? · is a space" if guess else "give a text that is one token, or an id",
    )


def parse_indices(given: Indices, count: int, name: str) -> list[int]:
    """Return the numbers of a list, in its order, each once; all `count` of them for None.

    Negative numbers count from the end: -1 is the last.

    Args:
        name: what is counted, for the error: layer, head or position.
    """
    if given is None:
        return list(range(count))
    text = given if isinstance(given, str) else ",".join(map(str, [given] if isinstance(given, int) else given))
    found: list[int] = []
    for part in map(str.strip, text.split(",")):
        head, dash, tail = part[1:].partition("-")
        try:
            first = int(part[:1] + head)
            last = int(tail) if dash else first
        except ValueError:
            raise LumiereError(f"{part!r} is not a {name}", "write numbers and ranges, such as 0,2-3") from None
        for index in (first, last):
            if not -count <= index < count:
                known = "0" if count == 1 else f"0 to {count - 1}"
                raise LumiereError(f"there is no {name} {index}", f"the {name}s are {known}")
        first, last = first % count, last % count
        if first > last:
            raise LumiereError(f"the {name}s {part} run backwards", "write the smaller number first")
        found += range(first, last + 1)
    return list(dict.fromkeys(found))


def count_tokens(ids: "np.ndarray", vocab_size: int) -> "np.ndarray":
    """Count each id in `ids`, (vocab_size,), in parts, since `ids` may be larger than memory."""
    import numpy as np

    parts = (ids[first : first + PART] for first in range(0, len(ids), PART))
    return sum((np.bincount(part, minlength=vocab_size) for part in parts), np.zeros(vocab_size, dtype=np.int64))


def spread(count: int, chosen: int) -> "np.ndarray":
    """Return `chosen` of the numbers below `count`, spread evenly from the first to the last."""
    import numpy as np

    return np.linspace(0, count - 1, chosen).round().astype(np.int64)


def counted_batches(count: int) -> str:
    return "1 batch" if count == 1 else f"{count:,} batches"


def counted_documents(count: int, *, are_windows: bool) -> str:
    """Return the number of independent texts behind a standard error, marked if it is small.

    Args:
        are_windows: whether the texts are windows of documents; otherwise each sequence is a text of its own.
    """
    from lumiere.evaluation.scoring import FEW_DOCUMENTS

    units = "documents" if are_windows else "sequences"
    return f"{count:,} {units}" if count >= FEW_DOCUMENTS else f"few {units}: {count:,}"


def batch_of(sequences: "list[tuple[int, ...]]", first_target: int = 1) -> "Batch":
    """Return sequences of one length as a batch.

    Args:
        first_target: the first position whose prediction counts.
    """
    import torch

    from lumiere.components.kernels import IGNORED
    from lumiere.data.batches import Batch

    tokens = torch.tensor(sequences)
    if tokens.shape[1] < 2:
        raise LumiereError("the text has one token and nothing to predict", "give a longer text")
    targets = tokens[:, 1:].clone()
    targets[:, : first_target - 1] = IGNORED
    return Batch(tokens[:, :-1].contiguous(), targets, int((targets != IGNORED).sum()))
