"""A generated text, with the probability of each of its tokens."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lumiere.persistence.loading import OpenedModel

if TYPE_CHECKING:
    import numpy as np

    from lumiere.generation.decoding import Limits, Piece
    from lumiere.generation.sampling import Sampling
    from lumiere.generation.text import Generation


@dataclass(frozen=True)
class Generated:
    """A generated text. `print` shows it with its prompt, a notebook shades each token by its probability.

    Attributes of the generation, such as `text` (without the prompt), `tokens` and `seed`, are attributes of this too.

    Attributes:
        pieces: What each step added.
        activations: By name, those that were asked for, with an entry for each token of `read`; otherwise empty.
        read: The ids that the activations are of: the last window of the text, of which the last token was not read
            unless the text ended by itself. Empty without activations.
    """

    generation: "Generation"
    pieces: "tuple[Piece, ...]" = field(repr=False)
    activations: "Mapping[str, np.ndarray]" = field(default_factory=dict, repr=False)
    read: tuple[int, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return (self.generation.prompt or "") + self.generation.text

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # such as what notebooks and `copy` look for
            raise AttributeError(name)
        return getattr(self.generation, name)

    def _repr_html_(self) -> str:
        from lumiere.report.fragments import text_fragment

        shown = [
            (piece.text, None if piece.token is None or piece.token.logprob is None else math.exp(piece.token.logprob))
            for piece in self.pieces
        ]
        return text_fragment(self.generation.prompt or "", shown)


def write(
    opened: OpenedModel,
    prompt: str | None,
    sampling: "Sampling",
    limits: "Limits",
    seed: int | None,
    names: str | Sequence[str] | None = None,
    steer: str | None = None,
) -> Generated:
    """Continue a text with the model as it is now."""
    import secrets

    from lumiere.api.steering import open_steering
    from lumiere.components.hooks import hooked
    from lumiere.data.text import plain
    from lumiere.generation.decoding import prompt_tokens
    from lumiere.generation.recording import Recorder
    from lumiere.generation.text import TextGenerator, generation_of

    prompt = None if prompt is None else plain(prompt)
    drawn = secrets.randbits(32) if seed is None else seed
    model, recorder = opened.model, None
    if names is not None:
        recorder = Recorder(model, [names] if isinstance(names, str) else names)
    steering = None if steer is None else open_steering(steer, opened)
    with nullcontext() if recorder is None else hooked(model, recorder.hooks):
        generator = TextGenerator(model, opened.tokenizer, steering=steering)
        pieces = tuple(generator.stream(prompt, sampling, limits, drawn))
    if steering is not None and not steering.holds:
        raise RuntimeError(f"steering acted at {steering.num_edits} of {steering.num_expected} positions x layers")
    generation = generation_of(prompt, pieces, None if sampling.is_greedy else drawn)
    if recorder is None:
        return Generated(generation, pieces)
    ids = [*prompt_tokens(opened.tokenizer, prompt), *(token.id for token in generation.tokens)]
    activations = {name: tensor.cpu().numpy() for name, tensor in recorder.activations().items()}
    return Generated(generation, pieces, activations, tuple(ids[recorder.start :][: recorder.num_positions]))
