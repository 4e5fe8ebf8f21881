"""Whether a checkpoint and a config belong together: before a model is made of them."""

import hashlib
import json

from lumiere.config.schema import RunConfig
from lumiere.data.tokenizer import MAX_BYTES, Tokenizer
from lumiere.errors import CheckpointError
from lumiere.files import parse_json, read_file
from lumiere.models.transformer import Transformer, build_model, empty_model
from lumiere.persistence.checkpoint_format import DAMAGE_HINT, Checkpoint
from lumiere.persistence.runs import Run

WITHOUT_EFFECT = {"dropout", "zero_output_init"}
"""Settings of the model that make no difference to what trained weights compute."""


def load_weights(config: RunConfig, checkpoint: Checkpoint, name: str) -> Transformer:
    """The model of `config` with the weights in `checkpoint`, in evaluation mode.

    Args:
        name: of the checkpoint, for messages.

    Raises:
        CheckpointError: the weights are those of another model, or not finite.
    """
    check_fit(config, checkpoint, name)
    if broken := [key for key, weight in checkpoint.model.items() if not weight.isfinite().all()]:
        raise CheckpointError(f"{name} holds weights that are not finite numbers: {broken[0]}", DAMAGE_HINT)
    model = build_model(config)
    model.load_state_dict(checkpoint.model)
    return model.eval()


def check_fit(config: RunConfig, checkpoint: Checkpoint, name: str) -> None:
    """Compare a checkpoint with the model of `config`, of which nothing is allocated yet.

    Weights of the right shapes are not enough: two heads of width 8 have the shapes of one of width 16. So the config
    that the checkpoint was saved with, if it says, must be the same too.

    Raises:
        CheckpointError: they do not belong together.
    """
    expected = {key: (weight.shape, weight.dtype) for key, weight in empty_model(config).state_dict().items()}
    found = {key: (weight.shape, weight.dtype) for key, weight in checkpoint.model.items()}
    settings = {
        "model": config.model.model_dump(exclude=WITHOUT_EFFECT),
        "tokenizer": config.tokenizer.model_dump(include={"vocab_size"}),
    }
    saved = checkpoint.metadata.get("config", {})
    if found != expected or not agree(saved, settings):
        raise CheckpointError(
            f"{name} does not fit the model in its config.yaml",
            "undo the changes to config.yaml; it describes the run as it was trained",
        )


def check_tokenizer(run: Run, tokenizer: Tokenizer, checkpoint: Checkpoint, name: str) -> None:
    """Compare the tokenizer of a run with the hash of the one that a checkpoint was trained with.

    Args:
        tokenizer: read from the run's `tokenizer.json`.
        name: of the checkpoint, for messages.

    Raises:
        CheckpointError: it is another tokenizer. A checkpoint without a hash fits any.
    """
    saved = checkpoint.metadata.get("tokenizer_sha256")
    if saved in (None, tokenizer.fingerprint):
        return
    # Another version of `tokenizers` may write the same tokenizer differently: compare what the file itself says.
    contents = parse_json(read_file(run.tokenizer_path, MAX_BYTES))
    text = json.dumps(contents, ensure_ascii=False, separators=(",", ":"))
    if hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() != saved:
        raise CheckpointError(
            f"{str(run.tokenizer_path)!r} is not the tokenizer that {name} was trained with",
            "restore the file; with other ids, the model's output means nothing",
        )


def agree(saved: object, settings: dict[str, dict[str, object]]) -> bool:
    """Whether `saved` says the same of all `settings` that it knows: an older version may lack some."""
    if not isinstance(saved, dict):
        return False
    sections = {section: saved.get(section, {}) for section in settings}
    return all(
        isinstance(section, dict) and all(section.get(key, value) == value for key, value in settings[name].items())
        for name, section in sections.items()
    )
