"""From what the user names to a model, its tokenizer and its config."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lumiere.cli.console import show_note
from lumiere.errors import LumiereError
from lumiere.persistence.runs import Run, RunStore

if TYPE_CHECKING:
    from lumiere.config.schema import RunConfig
    from lumiere.data.dataset import TokenizedCorpus
    from lumiere.data.tokenizer import Tokenizer
    from lumiere.models.transformer import Transformer


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint of a run, ready to use.

    Attributes:
        checkpoint: its name, which is `latest` where `best` was asked for and does not exist.
        step: updates that it has seen.
    """

    run: Run
    checkpoint: str
    step: int
    config: "RunConfig"
    tokenizer: "Tokenizer"
    model: "Transformer"

    @property
    def weights_sha256(self) -> str:
        """The hash of the weights, which the checkpoint's header has too."""
        from lumiere.persistence.checkpoint import hash_tensors

        return hash_tensors({name: weight.cpu() for name, weight in self.model.state_dict().items()})

    @cached_property
    def corpus(self) -> "TokenizedCorpus":
        """What the run's config names now, read once; `open_corpus` sees whether it is what the run was trained on."""
        from lumiere.cli.progress import CorpusProgress
        from lumiere.data.dataset import tokenize_corpus

        with CorpusProgress() as progress:
            return tokenize_corpus(self.config, progress)


def open_model(reference: str, checkpoint: str, device: str, runs_dir: str | None) -> OpenedModel:
    """The model of a run, in evaluation mode on `device`.

    Raises:
        LumiereError: if the run, the checkpoint or the device is not there, the checkpoint is damaged, or the run's
            tokenizer is not the one that it was trained with.
    """
    run = RunStore(runs_dir).open(reference)
    from lumiere.device import resolve_device
    from lumiere.persistence.checkpoint_manager import CheckpointManager
    from lumiere.persistence.fitting import check_tokenizer, load_weights

    target = resolve_device(device)
    name = run.resolve_checkpoint(checkpoint)
    if name != checkpoint:
        show_note(f"run {run.id} has no checkpoint {checkpoint} yet, {name} is taken")
    config = run.load_config()
    # Read once: a training may put another checkpoint in its place at any moment.
    loaded = CheckpointManager(run.path.parent).load(run, name, groups=("model",))
    described = f"checkpoint {name!r} of run {run.id}"
    model = load_weights(config, loaded, described).to(target)
    tokenizer = run.load_tokenizer()
    check_tokenizer(run, tokenizer, loaded, described)
    return OpenedModel(run, name, loaded.step, config, tokenizer, model)


def open_corpus(opened: OpenedModel, hint: str) -> "TokenizedCorpus":
    """The corpus that a run was trained on.

    Args:
        hint: the way out where it has changed.

    Raises:
        LumiereError: if it is not there, or is another one.
    """
    corpus = opened.corpus
    if corpus.fingerprint != opened.run.record.get("corpus_sha256"):
        raise LumiereError(
            f"the corpus '{opened.config.dataset.name}' is not the one that run {opened.run.id} was trained on", hint
        )
    return corpus
