"""Load a run's model, tokenizer and corpus, and check that they belong together.

Importing this module loads neither torch nor pydantic.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from lumiere.errors import CheckpointError, LumiereError
from lumiere.files import parse_json, read_file
from lumiere.persistence.runs import Run, RunStore

if TYPE_CHECKING:
    from lumiere.config.schema import RunConfig
    from lumiere.data.dataset import Progress, TokenizedCorpus
    from lumiere.data.tokenizer import Tokenizer
    from lumiere.models.transformer import Transformer
    from lumiere.persistence.checkpoint import Checkpoint

    ShowProgress = Callable[[], AbstractContextManager[Callable[[Progress], None] | None]]

IMPORTED_CONTEXT = 512
"""Tokens that `eval` and `inspect` give an imported model unless told otherwise: many have room for thousands."""


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint of a run, loaded.

    Attributes:
        checkpoint: The checkpoint's name; `latest` if `best` was requested and does not exist.
        step: The number of updates it has seen.
        max_tokens: The longest text to give the model, if it is less than its context.
        show_progress: Opens a display for reading the corpus.
    """

    run: Run
    checkpoint: str
    step: int
    config: RunConfig
    tokenizer: Tokenizer
    model: Transformer
    max_tokens: int | None = None
    show_progress: ShowProgress = field(default=nullcontext, repr=False)

    @property
    def context_size(self) -> int:
        """The longest text to give the model, in tokens."""
        limit = self.max_tokens or (IMPORTED_CONTEXT if self.run.record.status == "imported" else None)
        return min(limit or self.config.model.context_size, self.config.model.context_size)

    @property
    def weights_sha256(self) -> str:
        """The hash of the names, types, shapes and bytes of the weights."""
        from lumiere.persistence.tensor_files import hash_tensors

        return hash_tensors({name: weight.cpu() for name, weight in self.model.state_dict().items()})

    @cached_property
    def corpus(self) -> TokenizedCorpus:
        """The corpus that the run's config names, as it is now; `open_corpus` compares it with the recorded one.

        Raises:
            LumiereError: It cannot be read, or the run was imported.
        """
        if self.run.record.status == "imported":
            raise LumiereError(
                f"run {self.run.id} was imported without the text it was trained on",
                "give a text, or a dataset; lumiere train CONFIG --from RUN makes a run that has one",
            )
        from lumiere.data.dataset import tokenize_corpus

        with self.show_progress() as progress:
            return tokenize_corpus(self.config, progress, tokenizer=self.run.given_tokenizer(self.config))


def open_model(
    reference: str,
    checkpoint: str,
    device: str,
    runs_dir: str | None,
    notify: Callable[[str], None] = lambda note: None,
    show_progress: ShowProgress = nullcontext,
    max_tokens: int | None = None,
) -> OpenedModel:
    """Open a checkpoint of a run, with its model in evaluation mode on `device`.

    Args:
        notify: Receives a note if another checkpoint than the requested one is used.
        show_progress: Opens a display for reading the corpus.
        max_tokens: The longest text to give the model. Default: its context, 512 for an imported run.

    Raises:
        LumiereError: The run, checkpoint or device does not exist, the checkpoint is damaged, or the tokenizer is not
            the one that the run was trained with.
    """
    run = RunStore(runs_dir).open(reference)
    from lumiere.device import resolve_device

    target = resolve_device(device)
    config = run.load_config()
    name, loaded, model = _load(run, checkpoint, config)
    if name != checkpoint:
        notify(f"run {run.id} has no checkpoint {checkpoint} yet, {name} is taken")
    tokenizer = run.load_tokenizer(config)
    check_tokenizer(run, tokenizer, loaded, name)
    if run.record.status == "imported":
        model.num_tokens = len(tokenizer)
    return OpenedModel(run, name, loaded.step, config, tokenizer, model.to(target), max_tokens, show_progress)


def open_corpus(opened: OpenedModel, hint: str) -> TokenizedCorpus:
    """Return the corpus that a run was trained on.

    Args:
        hint: What the user can do if it has changed.

    Raises:
        LumiereError: It is missing, or has changed.
    """
    corpus = opened.corpus
    if corpus.fingerprint != opened.run.record.corpus_sha256:
        raise LumiereError(
            f"the corpus '{opened.config.dataset.name}' is not the one that run {opened.run.id} was trained on", hint
        )
    return corpus


def load_model(run: Run, checkpoint: str = "best") -> Transformer:
    """Return the model with the weights of `checkpoint`, on the CPU, in evaluation mode; see `Run.load_model`."""
    config = run.load_config()
    name, loaded, model = _load(run, checkpoint, config)
    if run.tokenizer_path.exists():
        check_tokenizer(run, run.load_tokenizer(config), loaded, name)
    return model


def load_weights(config: RunConfig, checkpoint: Checkpoint, name: str) -> Transformer:
    """Return the model of `config` with the weights of `checkpoint`, in evaluation mode.

    Args:
        name: What to call the checkpoint in errors.

    Raises:
        CheckpointError: The weights belong to another model, or are not finite.
    """
    from lumiere.models.transformer import build_model
    from lumiere.persistence.manifest import DAMAGE_HINT

    check_compatible(config, checkpoint, name)
    if broken := [key for key, weight in checkpoint.model.items() if not weight.isfinite().all()]:
        raise CheckpointError(f"{name} holds weights that are not finite numbers: {broken[0]}", DAMAGE_HINT)
    model = build_model(config)
    model.load_state_dict(checkpoint.model)
    return model.eval()


def check_compatible(config: RunConfig, checkpoint: Checkpoint, name: str) -> None:
    """Check that `checkpoint` was saved with the model of `config`, without allocating that model.

    Equal shapes are not enough: two heads of width 8 have the shapes of one of width 16. The config in the checkpoint
    must agree too, as far as it goes.

    Args:
        name: What to call the checkpoint in errors.

    Raises:
        CheckpointError: They do not belong together.
    """
    from lumiere.config.inheritance import NO_EFFECT_WHEN_TRAINED
    from lumiere.models.transformer import empty_model

    expected = {key: (weight.shape, weight.dtype) for key, weight in empty_model(config).state_dict().items()}
    found = {key: (weight.shape, weight.dtype) for key, weight in checkpoint.model.items()}
    settings = {
        "model": config.model.model_dump(exclude=NO_EFFECT_WHEN_TRAINED),
        "tokenizer": config.tokenizer.model_dump(include={"vocab_size"}),
    }
    if found != expected or not _agrees(checkpoint.metadata.get("config", {}), settings):
        raise CheckpointError(
            f"{name} does not fit the model in its config.yaml",
            "undo the changes to config.yaml; it describes the run as it was trained",
        )


def check_tokenizer(run: Run, tokenizer: Tokenizer, checkpoint: Checkpoint, name: str) -> None:
    """Compare the tokenizer of a run with the one that its checkpoint `name` was trained with, by hash.

    Raises:
        CheckpointError: It is another tokenizer. A checkpoint without a hash accepts any.
    """
    from lumiere.data.tokenizer import MAX_BYTES

    saved = checkpoint.metadata.get("tokenizer_sha256")
    if saved in (None, tokenizer.fingerprint):
        return
    # Another version of `tokenizers` may serialize the same tokenizer differently: compare the file itself.
    contents = parse_json(read_file(run.tokenizer_path, MAX_BYTES))
    text = json.dumps(contents, ensure_ascii=False, separators=(",", ":"))
    if hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() != saved:
        raise CheckpointError(
            f"{str(run.tokenizer_path)!r} is not the tokenizer that {_described(run, name)} was trained with",
            "restore the file; with other ids, the model's output means nothing",
        )


def _load(run: Run, checkpoint: str, config: RunConfig) -> tuple[str, Checkpoint, Transformer]:
    # Here, because every command imports this module, and few load a checkpoint.
    from lumiere.persistence.checkpoint_manager import CheckpointManager

    manager = CheckpointManager(run.path.parent)
    name = manager.resolve(run, checkpoint)
    loaded = manager.load(run, name, groups=("model",))
    return name, loaded, load_weights(config, loaded, _described(run, name))


def _described(run: Run, checkpoint: str) -> str:
    return f"checkpoint {checkpoint!r} of run {run.id}"


def _agrees(saved: object, settings: dict[str, dict[str, object]]) -> bool:
    """Return whether `saved` has the values of `settings`, apart from keys that an older version did not have."""
    if not isinstance(saved, dict):
        return False
    sections = {section: saved.get(section, {}) for section in settings}
    return all(
        isinstance(section, dict) and all(section.get(key, value) == value for key, value in settings[name].items())
        for name, section in sections.items()
    )
