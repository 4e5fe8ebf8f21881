"""Generate text with a trained model: what `lumiere generate` does, from Python.

    from lumiere.generation.text import TextGenerator
    generator = TextGenerator.open("latest")
    print(generator.write("Once upon a time", seed=1).text)

`TextGenerator` copies the weights once, in a layout for decoding.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lumiere.data.tokenizer import Tokenizer
from lumiere.device import resolve_device
from lumiere.errors import LumiereError
from lumiere.generation.decoding import (
    FinishReason,
    Limits,
    Piece,
    Token,
    beam_search,
    generate_pieces,
    prompt_tokens,
    row_random,
    suppressed_ids,
)
from lumiere.generation.kv_cache import CacheCheck, CachedDecoder, Decoder, FullForward, check_cache, compiled_step
from lumiere.generation.sampling import Sampling
from lumiere.generation.steering import SteeredDecoder, Steering
from lumiere.models.transformer import Transformer
from lumiere.persistence.runs import RunStore


@dataclass(frozen=True)
class Generation:
    """A generated text."""

    prompt: str | None
    text: str
    """Without the prompt."""
    tokens: tuple[Token, ...]
    """Without the end of the document; tokens of a stop string are included."""
    finish_reason: FinishReason
    seed: int | None
    """The seed that gives the same text again; None if nothing was drawn."""
    score: float | None = None
    """Of a beam search: the mean log-probability of its tokens."""


def generation_of(prompt: str | None, pieces: Sequence[Piece], seed: int | None) -> Generation:
    """Join all pieces of one row.

    Raises:
        ValueError: The last piece does not end the row.
    """
    reason = pieces[-1].finish_reason
    if reason is None:
        raise ValueError("the text has not ended")
    tokens = tuple(piece.token for piece in pieces if piece.token is not None)
    return Generation(prompt, "".join(piece.text for piece in pieces), tokens, reason, seed)


class TextGenerator:
    """A model and its tokenizer, prepared to generate one text, or one batch of texts, at a time.

    All methods share one cache: each call ends the text of the call before. They raise `LumiereError` for an empty
    prompt, and `NonFiniteError` if the model's logits are not finite.

    Args:
        model: In evaluation mode, on any device; its weights are copied.
        tokenizer: The one that the model was trained with.
        compile: Use `torch.compile`, which takes some seconds before the first token.
        warn: Called with the reason if that fails; generation then continues uncompiled.
        steering: Acts on all texts.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        compile: bool = False,  # noqa: A002 (the name of the setting)
        warn: Callable[[str], None] | None = None,
        steering: Steering | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.steering = steering
        self._suppressed = suppressed_ids(model.vocab_size, tokenizer)
        self._decoder: Decoder = CachedDecoder(model, self._suppressed, compiled_step(warn) if compile else None)
        if steering is not None:
            self._decoder = SteeredDecoder(self._decoder, model, steering)

    @classmethod
    def open(
        cls, run: str = "latest", checkpoint: str = "best", runs_dir: Path | str | None = None, device: str = "auto"
    ) -> "TextGenerator":
        """Load the model of a run.

        Raises:
            LumiereError: The run, the checkpoint or the device does not exist, or the checkpoint is damaged.
        """
        opened = RunStore(runs_dir).open(run)
        return cls(opened.load_model(checkpoint).to(resolve_device(device)), opened.load_tokenizer())

    def stream(
        self,
        prompt: str | None = None,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        seed: int | None = None,
    ) -> Iterator[Piece]:
        """Continue `prompt` (None: start a document), piece by piece."""
        rows = [prompt_tokens(self.tokenizer, prompt)]
        randoms = [row_random(seed)]
        return generate_pieces(self._decoder, self.tokenizer, rows, sampling or Sampling(), randoms, limits or Limits())

    def write(
        self,
        prompt: str | None = None,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        seed: int | None = None,
    ) -> Generation:
        """Generate one whole text."""
        return next(self.write_many([prompt], sampling, limits, seed))

    def write_many(
        self,
        prompts: Sequence[str | None],
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        seed: int | None = None,
        num_return_sequences: int = 1,
        batch_size: int = 64,
    ) -> Iterator[Generation]:
        """Generate texts for each prompt, in order, `batch_size` at a time.

        A text depends on the seed, on its prompt's place in `prompts` and on its number, not on `batch_size`.

        Raises:
            LumiereError: A number is below 1, or several texts are requested from greedy decoding, which has only one.
        """
        sampling = sampling or Sampling()
        _check_counts(num_return_sequences, batch_size)
        if sampling.is_greedy and num_return_sequences > 1:
            message = f"temperature 0 gives the same text {num_return_sequences} times"
            raise LumiereError(message, "raise the temperature, or leave out num-return-sequences")
        drawn_seed = secrets.randbits(32) if seed is None else seed
        rows = [prompt_tokens(self.tokenizer, prompt) for prompt in prompts]
        jobs = [(i, j) for i in range(len(prompts)) for j in range(num_return_sequences)]

        def generations() -> Iterator[Generation]:
            for begin in range(0, len(jobs), batch_size):
                batch = jobs[begin : begin + batch_size]
                randoms = [row_random(drawn_seed, *job) for job in batch]
                pieces: list[list[Piece]] = [[] for _ in batch]
                texts = [rows[i] for i, _ in batch]
                for piece in generate_pieces(
                    self._decoder, self.tokenizer, texts, sampling, randoms, limits or Limits()
                ):
                    pieces[piece.row].append(piece)
                for (i, _), row in zip(batch, pieces, strict=True):
                    yield generation_of(prompts[i], row, None if sampling.is_greedy else drawn_seed)

        return generations()  # a generator of its own, so that wrong arguments raise here

    def search(
        self,
        prompt: str | None = None,
        num_beams: int = 4,
        sampling: Sampling | None = None,
        max_new_tokens: int = 200,
        num_return_sequences: int = 1,
    ) -> list[Generation]:
        """Return the best texts of a beam search, best first.

        Args:
            sampling: Its `repetition_penalty` and `no_repeat_ngram_size`.

        Raises:
            LumiereError: More texts are requested than there are beams.
        """
        _check_counts(num_return_sequences, 1)
        if num_return_sequences > num_beams:
            message = f"{num_beams} beams cannot give {num_return_sequences} texts"
            raise LumiereError(message, "raise num-beams to that number")
        Limits(max_new_tokens)
        row = prompt_tokens(self.tokenizer, prompt)
        beams = beam_search(self._decoder, row, num_beams, max_new_tokens, self.tokenizer.end_ids, sampling)
        return [
            Generation(
                prompt,
                self.tokenizer.decode(beam.tokens),
                tuple(map(Token, beam.tokens)),
                "eos" if beam.is_ended else "length",
                None,
                beam.score,
            )
            for beam in beams[:num_return_sequences]
        ]

    def check(self, generation: Generation, num_tokens: int | None = None) -> CacheCheck:
        """Compare the cache with full forward passes along a text, or along its first `num_tokens` new tokens."""
        slow: Decoder = FullForward(self.model, self._suppressed)
        if self.steering is not None:
            slow = SteeredDecoder(slow, self.model, Steering(self.steering.added, self.steering.first))
        tokens = [token.id for token in generation.tokens[:num_tokens]]
        return check_cache(self._decoder, slow, prompt_tokens(self.tokenizer, generation.prompt), tokens)


def _check_counts(num_return_sequences: int, batch_size: int) -> None:
    if num_return_sequences < 1:
        raise LumiereError(f"num-return-sequences must be at least 1, not {num_return_sequences}", "1 is the default")
    if batch_size < 1:
        raise LumiereError(f"the batch size must be at least 1, not {batch_size}", "64 is the default")
