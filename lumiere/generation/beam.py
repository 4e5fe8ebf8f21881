"""Beam search: the likeliest text that a search over the likeliest beginnings finds.

As in `transformers`, with `early_stopping=False`: a text that the model has ended leaves the search with its score, the
sum of its tokens' logs of probability divided by their number, the end included.

Shapes: B beams, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lumiere.data.tokenizer import EOT
from lumiere.errors import LumiereError
from lumiere.generation.decoding import checked
from lumiere.generation.repetition import Repetition
from lumiere.generation.sampling import Sampling
from lumiere.generation.window import Decoder


@dataclass(frozen=True)
class Beam:
    """A text that the search has found.

    Attributes:
        tokens: what comes after the prompt, without the end of the document.
        score: mean log of probability of its tokens, in nats.
        is_ended: whether the model ended the document.
    """

    tokens: tuple[int, ...]
    score: float
    is_ended: bool


def beam_search(
    decoder: Decoder, prompt: Sequence[int], num_beams: int, max_new_tokens: int, sampling: Sampling | None = None
) -> list[Beam]:
    """The `num_beams` best texts after `prompt`, best first.

    Args:
        decoder: its logits are minus infinity at ids that may not come.
        sampling: its `repetition_penalty` and `no_repeat_ngram_size`; the penalty acts on logs of probability.

    Raises:
        LumiereError: there is less than one beam.
    """
    if num_beams < 1:
        raise LumiereError(f"there must be at least 1 beam, not {num_beams}", "4 are common")
    if max_new_tokens == 0:
        return [Beam((), 0.0, is_ended=False)] * num_beams
    logits_BV = checked(decoder.start([prompt]))
    decoder.keep([0] * num_beams)
    vocab_size = logits_BV.shape[-1]
    repetition = Repetition([prompt] * num_beams, sampling or Sampling(), vocab_size, logits_BV.device)
    texts: list[tuple[int, ...]] = [()]
    sums = [0.0]
    finished: list[Beam] = []
    for length in range(1, max_new_tokens + 1):
        # Only the first step has fewer texts than beams: all begin with the same prompt.
        logprobs_BV = repetition.applied(logits_BV.log_softmax(-1))[: len(texts)]
        totals_BV = logprobs_BV + torch.tensor(sums, dtype=logprobs_BV.dtype, device=logprobs_BV.device)[:, None]
        # Each text can end in one way only, so twice as many candidates hold enough that go on.
        best = totals_BV.flatten().topk(min(2 * num_beams, totals_BV.numel()))
        going: list[tuple[float, int, int]] = []
        for rank, (total, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            parent, token = divmod(place, vocab_size)
            if total == -torch.inf:
                continue
            if token != EOT:
                going.append((total, parent, token))
            elif rank < num_beams:
                finished.append(Beam(texts[parent], total / length, is_ended=True))
        going = going[:num_beams]
        finished = sorted(finished, key=lambda beam: -beam.score)[:num_beams]
        if not going or (len(finished) == num_beams and going[0][0] / length <= finished[-1].score):
            return finished
        sums = [total for total, _, _ in going]
        texts = [(*texts[parent], token) for _, parent, token in going]
        if length < max_new_tokens:
            missing = num_beams - len(going)
            parents = [parent for _, parent, _ in going] + [0] * missing
            tokens = [token for _, _, token in going] + [going[0][2]] * missing
            decoder.keep(parents)
            repetition.keep(parents)
            repetition.append(tokens)
            logits_BV = checked(decoder.step(tokens))
    finished += [Beam(text, total / max_new_tokens, is_ended=False) for text, total in zip(texts, sums, strict=True)]
    return sorted(finished, key=lambda beam: -beam.score)[:num_beams]
