"""A model that writes: what `lumiere generate` does, from Python.

    from lumiere.generation.text import TextGenerator
    generator = TextGenerator.open("latest")
    print(generator.write("Once upon a time", seed=1).text)

The class holds what is made once: the weights, arranged for decoding, and the cache.
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
from lumiere.generation.kv_cache import CacheCheck, CachedDecoder, FullForward, check_cache, compiled_step
from lumiere.generation.sampling import Sampling
from lumiere.models.transformer import Transformer
from lumiere.persistence.runs import RunStore


@dataclass(frozen=True)
class Generation:
    """A text that a model has written.

    Attributes:
        prompt: what it was to go on from.
        text: what it wrote, without the prompt.
        tokens: chosen one by one, without the end of the document; those of a stop string among them.
        finish_reason: `eos` (the model ended the document), `length` or `stop`.
        seed: that gives it again; None where nothing was drawn.
        score: of a beam search, the mean log of probability of its tokens; None otherwise.
    """

    prompt: str | None
    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    seed: int | None
    score: float | None = None


def generation_of(prompt: str | None, pieces: Sequence[Piece], seed: int | None) -> Generation:
    """The text that all pieces of one row make.

    Raises:
        ValueError: if the last one does not end it.
    """
    reason = pieces[-1].finish_reason
    if reason is None:
        raise ValueError("the text has not ended")
    tokens = tuple(piece.token for piece in pieces if piece.token is not None)
    return Generation(prompt, "".join(piece.text for piece in pieces), tokens, reason, seed)


class TextGenerator:
    """A model with its tokenizer, made ready to write one text, or one batch of texts, at a time.

    Args:
        model: in evaluation mode, on any device; its weights are copied.
        tokenizer: the one that it was trained with.
        compile: make the steps with `torch.compile`, which takes some seconds before the first token.
        warn: called with the reason where that fails; the steps are then made as without it.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        compile: bool = False,  # noqa: A002 (the name of the setting)
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._suppressed = suppressed_ids(model.vocab_size, len(tokenizer))
        self._decoder = CachedDecoder(model, self._suppressed, compiled_step(warn) if compile else None)

    @classmethod
    def open(
        cls,
        run: str = "latest",
        checkpoint: str = "best",
        runs_dir: Path | str | None = None,
        device: str = "auto",
    ) -> "TextGenerator":
        """The model of a run.

        Raises:
            LumiereError: if the run, the checkpoint or the device is not there, or the checkpoint is damaged.
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
        """Write on after `prompt` (None: begin a document), piece by piece.

        The cache is the generator's: whatever it writes next ends this text.

        Raises:
            LumiereError: if the prompt is empty.
            NonFiniteError: if the model's logits are no finite numbers.
        """
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
        """One whole text."""
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
        """Texts for each prompt, in order, made `batch_size` at a time.

        A text depends on the seed, on its prompt's place in `prompts` and on its number, not on `batch_size`.

        Raises:
            LumiereError: if a prompt is empty, a number below 1, or several texts are asked of a greedy choice, which
                has but one.
            NonFiniteError: if the model's logits are no finite numbers.
        """
        sampling = sampling or Sampling()
        _check_counts(num_return_sequences, batch_size)
        if sampling.is_greedy and num_return_sequences > 1:
            raise LumiereError(
                f"temperature 0 gives the same text {num_return_sequences} times",
                "raise the temperature, or leave out num-return-sequences",
            )
        seed = secrets.randbits(32) if seed is None else seed
        rows = [prompt_tokens(self.tokenizer, prompt) for prompt in prompts]
        jobs = [(i, j) for i in range(len(prompts)) for j in range(num_return_sequences)]
        return self._batches(prompts, rows, jobs, sampling, limits or Limits(), seed, batch_size)

    def _batches(
        self,
        prompts: Sequence[str | None],
        rows: Sequence[Sequence[int]],
        jobs: Sequence[tuple[int, int]],
        sampling: Sampling,
        limits: Limits,
        seed: int,
        batch_size: int,
    ) -> Iterator[Generation]:
        for begin in range(0, len(jobs), batch_size):
            batch = jobs[begin : begin + batch_size]
            randoms = [row_random(seed, i, j) for i, j in batch]
            pieces: list[list[Piece]] = [[] for _ in batch]
            batch_rows = [rows[i] for i, _ in batch]
            for piece in generate_pieces(self._decoder, self.tokenizer, batch_rows, sampling, randoms, limits):
                pieces[piece.row].append(piece)
            for (i, _), row in zip(batch, pieces, strict=True):
                yield generation_of(prompts[i], row, None if sampling.is_greedy else seed)

    def search(
        self,
        prompt: str | None = None,
        num_beams: int = 4,
        sampling: Sampling | None = None,
        max_new_tokens: int = 200,
        num_return_sequences: int = 1,
    ) -> list[Generation]:
        """The best texts of a beam search, best first.

        Args:
            sampling: its `repetition_penalty` and `no_repeat_ngram_size`.

        Raises:
            LumiereError: if the prompt is empty, or more texts are asked for than there are beams.
            NonFiniteError: if the model's logits are no finite numbers.
        """
        _check_counts(num_return_sequences, 1)
        if num_return_sequences > num_beams:
            raise LumiereError(
                f"{num_beams} beams cannot give {num_return_sequences} texts", "raise num-beams to that number"
            )
        Limits(max_new_tokens)
        row = prompt_tokens(self.tokenizer, prompt)
        beams = beam_search(self._decoder, row, num_beams, max_new_tokens, sampling)
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

    def check(self, generation: Generation) -> CacheCheck:
        """The cache against full forward passes, along a text."""
        slow = FullForward(self.model, self._suppressed)
        tokens = [token.id for token in generation.tokens]
        return check_cache(self._decoder, slow, prompt_tokens(self.tokenizer, generation.prompt), tokens)


def _check_counts(num_return_sequences: int, batch_size: int) -> None:
    if num_return_sequences < 1:
        raise LumiereError(f"num-return-sequences must be at least 1, not {num_return_sequences}", "1 is the default")
    if batch_size < 1:
        raise LumiereError(f"the batch size must be at least 1, not {batch_size}", "64 is the default")
