"""Text, token by token.

Shapes: T position, V vocabulary.
"""

import codecs
from collections.abc import Iterator, Sequence

import torch

from lumiere.data.tokenizer import EOT, PAD, SOT, Tokenizer
from lumiere.errors import LumiereError, NonFiniteError
from lumiere.generation.sampling import Sampling, sample
from lumiere.models.transformer import Transformer


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | None = None,
    max_new_tokens: int = 200,
    sampling: Sampling | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """Stream the text that `model` writes after `prompt`, in pieces that are whole characters.

    Args:
        model: in evaluation mode, on any device.
        tokenizer: the one that the model was trained with.
        prompt: the beginning of a document, not repeated in what is returned (None: the model begins by itself).
        max_new_tokens: tokens after which the text ends, unless the model ends it before.
        sampling: how each token is chosen (None: `Sampling()`).
        seed: of the draws (None: a new one each time).

    Raises:
        LumiereError: if the prompt is empty.
        NonFiniteError: if the model's logits are no finite numbers, as those of a broken model are.
    """
    if prompt is not None and not prompt.strip():
        raise LumiereError("the prompt is empty", "give it some text, or leave it out to let the model begin")
    tokens = [SOT, *(tokenizer.encode(prompt) if prompt else [])]
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in generate_tokens(model, tokens, max_new_tokens, sampling or Sampling(), generator, len(tokenizer)):
        if piece := decoder.decode(tokenizer.token_bytes(token)):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def generate_tokens(
    model: Transformer,
    tokens: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    num_used: int,
) -> Iterator[int]:
    """Stream tokens after `tokens`, up to the end of the document.

    Past the context window the model sees the last `context_size` tokens, as it did within long documents in
    training.

    Args:
        generator: on the CPU, where the draws are made, so that a seed gives the same text on every device.
        num_used: ids from here on stand for nothing, since the corpus was too small for them.
    """
    device = next(model.parameters()).device
    tokens = list(tokens)
    for _ in range(max_new_tokens):
        window_T = torch.tensor(tokens[-model.context_size :], device=device)
        with torch.no_grad():
            logits_V = model.logits(window_T[None])[0, -1].float().cpu()
        logits_V[num_used:] = -torch.inf
        logits_V[[SOT, PAD]] = -torch.inf
        # NaN is the largest of all; minus infinity, if it is the largest, stands everywhere.
        if not logits_V.max().isfinite():
            raise NonFiniteError("the model's logits are not finite numbers", "its weights are broken: train it anew")
        token = sample(logits_V, sampling, generator)
        if token == EOT:
            return
        tokens.append(token)
        yield token
