"""Pairs of prompts that differ in few tokens: the clean one, and the corrupt one, in which a behavior is gone.

Shapes: B pair, T position, X anything.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

import numpy as np
import torch
from torch import Tensor

from lumiere.components.short_repr import ShortRepr
from lumiere.errors import LumiereError
from lumiere.models.transformer import Transformer

MAX_DIFFERENCES, MAX_SHOWN = 4, 8
"""Places at which two prompts differ that an error names, and tokens of each that it shows."""


@dataclass(frozen=True)
class PromptPairs(ShortRepr):
    """Clean and corrupt prompts of one length, token by token in the same places. `pair_up` makes and checks them.

    Attributes:
        clean: (B, T) ids.
        corrupt: (B, T) ids.
        positions: (B,) where the model's prediction is read.
        targets: (B,) the tokens that the clean prompts should predict; None if no metric asks.
        versus: (B,) the tokens that they are compared with, such as those that the corrupt prompts should predict.
        groups: (B,) numbers of what is resampled together, such as prompts of one template.
    """

    clean: Tensor
    corrupt: Tensor
    positions: Tensor
    targets: Tensor | None
    versus: Tensor | None
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def changed(self) -> Tensor:
        """(B, T) true where the prompts differ."""
        return self.clean != self.corrupt

    @property
    def first_changed(self) -> int:
        """The first position at which any pair differs: before it, all activations are equal."""
        return int(self.changed.any(0).nonzero()[0, 0])

    def read(self, values_BTX: Tensor) -> Tensor:
        """Return the values at the read positions, (B, X), of (B, T, X)."""
        return values_BTX[torch.arange(len(self), device=values_BTX.device), self.positions]

    def to(self, device: torch.device) -> "PromptPairs":
        """Return the same pairs on a device."""
        return self._mapped(lambda value: value.to(device), self.groups)

    def select(self, rows: Sequence[int]) -> "PromptPairs":
        """Return some of the pairs."""
        return self._mapped(lambda value: value[list(rows)], self.groups[list(rows)])

    def _mapped(self, function: Callable[[Tensor], Tensor], groups: np.ndarray) -> "PromptPairs":
        targets, versus = (None if ids is None else function(ids) for ids in (self.targets, self.versus))
        return PromptPairs(
            function(self.clean), function(self.corrupt), function(self.positions), targets, versus, groups
        )

    def with_predictions(self, model: Transformer) -> "PromptPairs":
        """Return the same pairs with a target each: without `targets`, what the model predicts.

        Then the target is the most probable token after the clean prompt, and `versus` the one after the corrupt
        prompt.

        Raises:
            LumiereError: There are no targets, and a pair predicts the same token twice.
        """
        if self.targets is not None:
            return self
        device = next(model.parameters()).device
        with torch.inference_mode():
            clean_B, corrupt_B = (
                self.read(model.logits(tokens.to(device)).cpu()).argmax(-1) for tokens in (self.clean, self.corrupt)
            )
        if bool((clean_B == corrupt_B).any()):
            raise LumiereError(
                "the model predicts the same token after the clean and the corrupt prompt",
                "name the token with --target, and one to compare it with, --vs",
            )
        return replace(self, targets=clean_B.clone(), versus=corrupt_B.clone())


def pair_up(
    clean: Sequence[Sequence[int]],
    corrupt: Sequence[Sequence[int]],
    targets: Sequence[int] | None = None,
    versus: Sequence[int] | None = None,
    position: int = -1,
    groups: Sequence[int] | None = None,
    label: Callable[[int], str] = str,
) -> PromptPairs:
    """Return pairs of prompts, checked.

    Args:
        clean, corrupt: (B, T) ids.
        targets, versus: (B,) ids.
        position: Where predictions are read; -1 is the last position.
        groups: (B,) Default: each pair is one of its own.
        label: Returns a token as it is printed.

    Raises:
        LumiereError: As `check_pair`; or the pairs have several lengths, or a target is what it is compared with.
    """
    for pair in zip(clean, corrupt, strict=True):
        check_pair(*pair, label)
    lengths = sorted({len(tokens) for tokens in clean})
    if len(lengths) > 1:
        raise LumiereError(
            f"the prompts have {' and '.join(map(str, lengths))} tokens, and positions are compared between pairs",
            "give pairs of one length",
        )
    if targets is not None and versus is not None and any(map(int.__eq__, targets, versus)):
        raise LumiereError("a target is compared with itself", "choose two different tokens")
    (length,) = lengths
    return PromptPairs(
        clean=torch.tensor([list(tokens) for tokens in clean]),
        corrupt=torch.tensor([list(tokens) for tokens in corrupt]),
        positions=torch.full((len(clean),), position % length),
        targets=None if targets is None else torch.tensor(list(targets)),
        versus=None if versus is None else torch.tensor(list(versus)),
        groups=np.arange(len(clean)) if groups is None else np.array(groups),
    )


def check_pair(clean: Sequence[int], corrupt: Sequence[int], label: Callable[[int], str] = str) -> None:
    """Check that two prompts have the same number of tokens and differ.

    Raises:
        LumiereError: They do not; where the lengths differ, the hint shows the tokens at which they part.
    """
    if list(clean) == list(corrupt):
        raise LumiereError("the clean and the corrupt prompt are the same", "change a token of the corrupt one")
    if len(clean) != len(corrupt):
        raise LumiereError(
            f"the clean prompt has {len(clean)} tokens, the corrupt one {len(corrupt)}",
            f"they must align; {differences(clean, corrupt, label)}",
        )


def differences(clean: Sequence[int], corrupt: Sequence[int], label: Callable[[int], str]) -> str:
    """Return in words where two prompts differ, with the tokens of both."""

    def shown(tokens: Sequence[int]) -> str:
        more = " ..." if len(tokens) > MAX_SHOWN else ""
        return (" ".join(map(label, tokens[:MAX_SHOWN])) or "nothing") + more

    parts = [
        f"from position {first} {shown(clean[first:last])} became {shown(corrupt[start:end])}"
        for kind, first, last, start, end in SequenceMatcher(None, clean, corrupt, autojunk=False).get_opcodes()
        if kind != "equal"
    ]
    more = f", and {len(parts) - MAX_DIFFERENCES} more" if len(parts) > MAX_DIFFERENCES else ""
    return "; ".join(parts[:MAX_DIFFERENCES]) + more
