"""All analyses of one model, gathered for the report page.

Shapes: T position, C candidate word.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lumiere.data.batches import Batch
from lumiere.data.tokenizer import PAD, SPECIAL_TOKENS
from lumiere.interpret.ablation import Ablations, ablate
from lumiere.interpret.attention import AttentionPatterns, attention_patterns
from lumiere.interpret.head_scores import HeadScores, score_heads
from lumiere.interpret.logit_attribution import LogitAttribution, logit_attribution
from lumiere.interpret.logit_lens import NO_TARGET, LogitLens, logit_lens
from lumiere.interpret.neurons import NeuronExamples, TokenMap, neuron_examples, token_map
from lumiere.interpret.result import Result
from lumiere.interpret.summary import ModelSummary, summarize
from lumiere.interpret.token_losses import TokenLosses, token_losses
from lumiere.models.transformer import Transformer

CANDIDATES = 3
"""The model's most probable next words that are explained at each position; the text's own next word is another."""
LENS_TOKENS = 3
MAP_TOKENS = 300
MOST_NEURONS = 1024
"""Of all layers together, so that the page stays small."""


@dataclass(frozen=True)
class Text:
    """A text to look at.

    Attributes:
        tokens: (T,) at least two ids.
        source: where they come from, in words.
    """

    tokens: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class TextInspection:
    """What a model does on one text. `candidates` has one attribution of all positions for each of C words.

    Attributes:
        candidates: of the most probable words, the best first, and last of the word that the text goes on with; at the
            last position, where it does not, of the most probable again.
    """

    text: Text
    attention: AttentionPatterns
    lens: LogitLens
    losses: TokenLosses
    candidates: tuple[LogitAttribution, ...]


@dataclass(frozen=True)
class Inspection:
    """What a model is, on the texts and on the validation split.

    Attributes:
        texts: at least one.
        ablation: of each head; None without validation text, as `neurons`.
    """

    summary: ModelSummary
    texts: tuple[TextInspection, ...]
    heads: HeadScores
    ablation: Ablations | None
    neurons: NeuronExamples | None
    embeddings: TokenMap

    def results(self) -> list[tuple[str, Result]]:
        """All results, and the commands that give the same."""
        named: list[tuple[str, Result | None]] = [
            ("summary", self.summary),
            ("heads", self.heads),
            ("ablate", self.ablation),
            ("neurons", self.neurons),
            ("embeddings", self.embeddings),
        ]
        for number, text in enumerate(self.texts, 1):
            named += [(f"attention, text {number}", text.attention), (f"lens, text {number}", text.lens)]
            named += [(f"tokens, text {number}", text.losses)]
            named += [(f"logits, text {number}, word {rank}", of) for rank, of in enumerate(text.candidates, 1)]
        return [(name, result) for name, result in named if result is not None]


def inspect_model(
    model: Transformer,
    texts: Sequence[Text],
    repeated_NT: torch.Tensor,
    batches: Sequence[Batch] = (),
    windows: tuple[torch.Tensor, np.ndarray] | None = None,
    token_counts: np.ndarray | None = None,
    num_used: int | None = None,
    averaged: Sequence[int] | None = None,
) -> Inspection:
    """Every analysis that the page shows.

    Args:
        model: in evaluation mode.
        texts: to look at, each of 2 to `context_size` tokens.
        repeated_NT: random tokens that come twice, for the heads' scores.
        batches: validation windows; none: no ablation and no neurons.
        windows: of the validation split, with their documents, for the in-context-learning score and natural repeats.
        token_counts: how often each token stands in the training split, for the map; None: the first tokens.
        num_used: ids that the tokenizer gives out; None: all.
        averaged: the tokens over which centered logits and copying average; None: all.
    """
    num_neurons = min(model.d_ff, MOST_NEURONS // model.num_layers)
    return Inspection(
        summary=summarize(model, batches, token_counts),
        texts=tuple(inspect_text(model, text, averaged) for text in texts),
        heads=score_heads(model, repeated_NT, windows, averaged),
        ablation=ablate(model, batches) if batches else None,
        neurons=neuron_examples(model, batches, num_neurons) if batches else None,
        embeddings=token_map(model, frequent_tokens(model, token_counts, num_used)),
    )


def inspect_text(model: Transformer, text: Text, averaged: Sequence[int] | None = None) -> TextInspection:
    """One forward pass for each analysis, and one for each of the words to explain."""
    tokens, positions = text.tokens, range(len(text.tokens))
    lens = logit_lens(model, tokens, top_k=LENS_TOKENS)
    words = [lens.top_tokens[-1, :, rank] for rank in range(min(CANDIDATES, LENS_TOKENS))]
    words.append(np.where(lens.targets == NO_TARGET, words[0], lens.targets))
    return TextInspection(
        text=text,
        attention=attention_patterns(model, tokens),
        lens=lens,
        losses=token_losses(model, tokens),
        candidates=tuple(
            logit_attribution(model, tokens, positions, word.tolist(), by="head", averaged=averaged) for word in words
        ),
    )


def frequent_tokens(model: Transformer, counts: np.ndarray | None, num_used: int | None = None) -> list[int]:
    """The ids for the map: the most frequent in training, without special ones, and at most `MAP_TOKENS`."""
    used = model.vocab_size if num_used is None else min(num_used, model.vocab_size)
    first = len(SPECIAL_TOKENS)
    order = np.arange(first, used)
    if counts is not None:
        order = order[np.argsort(-counts[first:used], kind="stable")]
        order = order[counts[order] > 0]
    return [int(token) for token in order[:MAP_TOKENS] if token != PAD]
