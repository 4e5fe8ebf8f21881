"""`lumiere.open`: a run, the model of one of its checkpoints, and what can be done with it."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumiere.api.inspection import Inspect
from lumiere.persistence import loading
from lumiere.persistence.loading import OpenedModel
from lumiere.persistence.metrics import read_metrics
from lumiere.persistence.runs import Run, RunStore, split_reference

if TYPE_CHECKING:
    import pandas as pd

    from lumiere.api.evaluation import Evaluated
    from lumiere.api.generation import Generated
    from lumiere.config.schema import RunConfig
    from lumiere.data.dataset import Progress
    from lumiere.data.tokenizer import Tokenizer
    from lumiere.models.transformer import Transformer
    from lumiere.persistence.loading import ShowProgress
    from lumiere.persistence.record import RunRecord
    from lumiere.training.events import Event

DEFAULT_TEMPERATURE = 0.8


class OpenedRun:
    """A run and the model of one of its checkpoints, which is loaded when it is first used.

    Attributes:
        run: Its folder and files.
        device: Where the model is.
        max_tokens: The longest text to give the model. Default: its context, 512 for an imported run.
        notify: Receives notes about what is left out.
    """

    def __init__(
        self,
        run: Run,
        checkpoint: str = "best",
        device: str = "cpu",
        max_tokens: int | None = None,
        notify: Callable[[str], None] = lambda note: None,
        show_progress: "ShowProgress" = nullcontext,
    ) -> None:
        self.run = run
        self.device = device
        self.max_tokens = max_tokens
        self.notify = notify
        self._checkpoint = checkpoint
        self._show_progress = show_progress

    @cached_property
    def opened(self) -> OpenedModel:
        """The loaded checkpoint."""
        from lumiere.device import keep_freed_memory

        keep_freed_memory()  # a pass that keeps its activations frees them at its end, as a training step does
        place = self.device, str(self.run.path.parent)
        show = self.notify, self._show_progress
        return loading.open_model(self.run.name, self._checkpoint, *place, *show, self.max_tokens)

    @property
    def id(self) -> str:
        return self.run.id

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def path(self) -> Path:
        return self.run.path

    @property
    def record(self) -> "RunRecord":
        """The contents of `run.json`: status, device, versions, command and more."""
        return self.run.record

    @property
    def checkpoint(self) -> str:
        """The name of the checkpoint; `latest` if `best` was requested and does not exist yet."""
        return self.opened.checkpoint

    @property
    def step(self) -> int:
        """The number of updates that the checkpoint has seen."""
        return self.opened.step

    @property
    def config(self) -> "RunConfig":
        """The complete config that the run was started with."""
        return self.opened.config

    @property
    def tokenizer(self) -> "Tokenizer":
        return self.opened.tokenizer

    @property
    def model(self) -> "Transformer":
        """The model, in evaluation mode. All analyses use it as it is, so changed weights change their results."""
        return self.opened.model

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl` so far, as docs/metrics.md describes them."""
        return read_metrics(self.run.metrics_path)

    def metrics_frame(self) -> "pd.DataFrame":
        """Return the metrics as a table; NaN where a record lacks a value."""
        import pandas as pd

        return pd.DataFrame(self.metrics)

    def at(self, checkpoint: str | int) -> "OpenedRun":
        """Return another checkpoint of the run: best, latest, previous, or a step with a snapshot.

        Raises:
            LumiereError: There is no such checkpoint.
        """
        check_checkpoint(self.run, str(checkpoint))
        return OpenedRun(self.run, str(checkpoint), self.device, self.max_tokens, self.notify, self._show_progress)

    def beside(self, other: "OpenedRun | str | Path") -> "OpenedRun":
        """Return an opened run as it is, or open one of the same runs directory on the same device."""
        if isinstance(other, OpenedRun):
            return other
        return open_run(other, runs_dir=self.run.path.parent, device=self.device)

    def generate(
        self,
        prompt: str | None = None,
        *,
        max_new_tokens: int = 200,
        stop: Sequence[str] = (),
        seed: int | None = None,
        temperature: float = DEFAULT_TEMPERATURE,
        names: str | Sequence[str] | None = None,
        steer: str | None = None,
        **controls: Any,
    ) -> "Generated":
        """Continue a text; without one, start a new document.

        Args:
            stop: Texts to stop before.
            seed: Gives the same text again. Default: a new one.
            temperature: Divides the logits; 0 is greedy.
            names: Activations to keep, such as `blocks.*.hook_resid_post`, as `activations` of the result.
            steer: Adds a direction to the residual stream: `FILE.safetensors[@layer][*scale]`, as in docs/causes.md.
            controls: `top_k`, `top_p`, `min_p`, `typical_p`, `repetition_penalty` and `no_repeat_ngram_size`, as in
                `lumiere.generation.sampling.Sampling`.

        Raises:
            LumiereError: The prompt is empty, or a value is out of range.
        """
        from lumiere.api.generation import write
        from lumiere.generation.decoding import Limits
        from lumiere.generation.sampling import Sampling

        sampling = Sampling(temperature, **controls)
        return write(self.opened, prompt, sampling, Limits(max_new_tokens, tuple(stop), 0), seed, names, steer)

    def evaluate(
        self,
        split: str | None = None,
        *,
        text: str | None = None,
        file: str | Path | None = None,
        dataset: str | None = None,
        subset: str | None = None,
        stride: int | None = None,
        batch_size: int | None = None,
        baselines: bool = True,
    ) -> "Evaluated":
        """Score the model: loss, perplexity, bits per byte, accuracy, calibration, and n-gram baselines.

        Nothing is saved, unlike `lumiere eval`; `keep()` of the result does.

        Args:
            split: train, validation or test, of the run's corpus or of `dataset`. Default: validation.
            text, file: Score this text, or the text of a UTF-8 file.
            dataset, subset: Score a dataset: stories, a Hub name or a folder.
            stride: Score each token once, in windows this many tokens apart. Default: the windows of training.
            batch_size: Windows in a batch of the averages over batches. Default: as in training.
            baselines: Whether to compare with n-gram models of the training split.

        Raises:
            LumiereError: Two texts are given, or the text is missing or empty.
        """
        from lumiere.api.evaluation import evaluate

        return evaluate(self.opened, split, text, file, dataset, subset, stride, batch_size, baselines)

    def resume(
        self,
        settings: Mapping[str, Any] | None = None,
        *,
        callbacks: "Sequence[Callable[[Event], None]]" = (),
        corpus_progress: "Callable[[Progress], None] | None" = None,
        **training: Any,
    ) -> "OpenedRun":
        """Continue to train the run from its latest checkpoint, as `lumiere train --resume` does, and open it again.

        On a CPU, the result is bit-identical to a run that was never interrupted. A finished run is returned as it is,
        unless a setting extends it, such as `max_steps=2000`.

        Args:
            settings: What to change, by dotted path, of the settings that a resume may change.
            callbacks, corpus_progress, training: As for `lumiere.train`.

        Raises:
            LumiereError: The run was imported or is in use, a setting may not be changed, or the corpus has changed.
        """
        from lumiere.api.training import resume

        return resume(self, settings, callbacks=callbacks, corpus_progress=corpus_progress, **training)

    @property
    def inspect(self) -> Inspect:
        """The analyses of the model."""
        return Inspect(self)

    def _repr_html_(self) -> str:
        from lumiere.persistence.metrics import read_history
        from lumiere.report.figures.curves import draw_loss_curves
        from lumiere.report.fragments import fragment

        record, history = self.record, read_history(self.run.metrics_path)
        best = f", best validation loss {record.best_loss:.4f}" if record.best_loss is not None else ""
        facts = f"{self.name} on {record.dataset or '?'}: {self.run.status} at step {record.step or 0:,}{best}"
        return fragment(self.name, facts, lambda: draw_loss_curves([(self.id, history)]))

    def __repr__(self) -> str:
        return f"<{self.name}, checkpoint {self._checkpoint}>"


def open_run(
    run: str | Path = "latest",
    checkpoint: str | int = "best",
    *,
    runs_dir: str | Path | None = None,
    device: str = "cpu",
    max_tokens: int | None = None,
) -> OpenedRun:
    """Open a checkpoint of a run.

    Args:
        run: Full name, id, unique start of an id, or `latest`; `RUN@CHECKPOINT`; or the path of a run's folder.
        checkpoint: best, latest, previous, or a step with a snapshot.
        runs_dir: Default: `LUMIERE_RUNS_DIR`, or `runs` in the current folder.
        device: Where to compute: cpu, auto, cuda, cuda:1 or mps.
        max_tokens: The longest text to give the model. Default: its context, 512 for an imported run.

    Raises:
        LumiereError: There is no such run, checkpoint or device.
    """
    from lumiere.device import resolve_device

    path, (reference, checkpoint) = Path(run), split_reference(Path(run).name, str(checkpoint))
    if isinstance(run, Path) or os.sep in run:
        runs_dir = path.parent
    found = RunStore(runs_dir).open(reference)
    check_checkpoint(found, checkpoint)
    resolve_device(device)
    return OpenedRun(found, checkpoint, device, max_tokens)


def check_checkpoint(run: Run, name: str) -> None:
    """Raise `LumiereError` unless the checkpoint, or `latest` in place of a missing `best`, exists."""
    from lumiere.persistence.checkpoint_manager import CheckpointManager

    manager = CheckpointManager(run.path.parent)
    manager.load(run, manager.resolve(run, name), groups=())
