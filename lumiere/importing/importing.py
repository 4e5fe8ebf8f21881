"""Make a run of a model from elsewhere."""

import contextlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lumiere.config.loader import dump_config, validate
from lumiere.errors import LumiereError
from lumiere.files import open_file, writing
from lumiere.importing.source import Imported, open_source
from lumiere.importing.verification import verify
from lumiere.models.transformer import Transformer
from lumiere.persistence.checkpoint import Checkpoint
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.manifest import hash_file
from lumiere.persistence.runs import Run, RunStore
from lumiere.training.run import environment, now

NO_DATASET = "none"
"""`dataset.name` of a run that was not trained here."""


def import_model(
    source: str,
    store: RunStore,
    *,
    revision: str | None = None,
    context_size: int | None = None,
    verified: bool | None = None,
    command: Sequence[str] = (),
) -> Run:
    """Make a run, with status `imported`, of a model from elsewhere.

    Args:
        source: A folder in the form of Hugging Face, a name on its Hub, a GGUF file, or the safetensors file of a state
            dict with its `config.json` and `tokenizer.json` beside it.
        revision: Branch, tag or commit on the Hub.
        context_size: Maximum number of positions; at most the source's, which is the default.
        verified: Whether to compare the log-probabilities with those of `transformers`, if it has such a class.
            Default: if it is installed.
        command: What the user typed, for the record.

    Raises:
        LumiereError: The model cannot be read or computed, its tokenizer is unsafe or has ids without a row in the
            embedding, or it computes something else than in `transformers`. No run is made.
    """
    found = open_source(source, revision)
    model, tokenizer = found.model, found.tokenizer
    if len(tokenizer) > model.vocab_size:
        raise LumiereError(
            f"the tokenizer has the id {len(tokenizer) - 1:,}, the embedding has {model.vocab_size:,} rows",
            "the tokenizer belongs to another model",
        )
    if verified is None:
        verified = importlib.util.find_spec("transformers") is not None
    error = verify(model, found.reference, tokenizer.text_ids) if verified and found.reference else None
    if context_size is not None:
        model = with_context(model, context_size)
    return save(found, model, source, error, store, command)


def with_context(model: Transformer, context_size: int) -> Transformer:
    """Return the model for shorter texts.

    Raises:
        LumiereError: It is no positive number, or more than the model has.
    """
    if not 1 <= context_size <= model.context_size:
        raise LumiereError(f"the context size {context_size} is not 1 to {model.context_size:,}", "give a smaller one")
    settings: dict[str, Any] = model.settings.model_dump() | {"context_size": context_size}
    with torch.device("meta"):
        shorter = Transformer(model.vocab_size, **settings)
    weights = model.state_dict()
    for name, expected in shorter.state_dict().items():
        weights[name] = weights[name][: len(expected)]
    shorter.load_state_dict(weights, assign=True)
    return shorter.eval()


def save(
    found: Imported, model: Transformer, source: str, error: float | None, store: RunStore, command: Sequence[str]
) -> Run:
    """Write the run; nothing of it stays if that fails."""
    config = validate(
        {
            "model": model.settings.model_dump() | {"dropout": 0.0},
            "tokenizer": {"path": source, "vocab_size": model.vocab_size},
            "dataset": {"name": NO_DATASET, "sliding_window_size": min(8, model.context_size - 1)},
        }
    )
    hashes = {path.name: sha256_of(path) for path in found.files}
    where = source if "hub" in found.origin else str(Path(source).resolve())
    run = store.create()
    try:
        with writing(run.path):
            run.save_tokenizer(found.tokenizer)
            run.disk.write(run.config_path, dump_config(config).encode())
        run.update(
            name=run.name,
            status="imported",
            created_at=now(),
            command=list(command),
            num_parameters=model.num_parameters,
            step=0,
            source={"path": where, **found.origin, "files": hashes, "error": error, "verified": error is not None},
            **environment(),
        )
        metadata = {
            "step": 0,
            "config": config.model_dump(mode="json"),
            "tokenizer_sha256": found.tokenizer.fingerprint,
        }
        weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
        CheckpointManager(store.runs_dir).save(run, ("best", "latest"), Checkpoint(weights, metadata=metadata))
    except BaseException:
        with contextlib.suppress(OSError):
            run.disk.remove(run.path)
        raise
    return run


def sha256_of(path: Path) -> str:
    with open_file(path) as file:
        return hash_file(file)
