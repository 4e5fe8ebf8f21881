"""Metrics for TensorBoard, in the folder `tensorboard` of the run."""

from typing import TYPE_CHECKING

from lumiere.config.loader import dump_config, flat_settings
from lumiere.config.schema import RunConfig
from lumiere.persistence.runs import Run
from lumiere.training.events import EvaluationEvent, Event, Listener, StartEvent, StepEvent
from lumiere.training.loggers.tags import figures

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

FOLDER = "tensorboard"


class TensorBoardLog:
    """A listener that writes event files. The config stands there as text, and as hyperparameters.

    After a resume the steps behind the checkpoint come again; TensorBoard is told to forget the first ones.
    """

    def __init__(self, config: RunConfig, run: Run, tell: Listener) -> None:
        self._config = config
        self._folder = run.path / FOLDER
        self._writer: SummaryWriter | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, StartEvent):
            self._open(event.step)
        elif isinstance(event, StepEvent | EvaluationEvent) and self._writer is not None:
            for tag, value in figures(event).items():
                self._writer.add_scalar(tag, value, event.step)
            if isinstance(event, EvaluationEvent):
                self._writer.flush()  # otherwise a kill could take two minutes of it

    def close(self, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard.summary import hparams
        from torch.utils.tensorboard.writer import SummaryWriter

        # What was written at `step` itself stays, except for a run that was killed before it saved anything.
        is_new = not self._folder.exists()
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1 if step else 0)
        if not is_new:
            return
        self._writer.add_text("config", f"```yaml\n{dump_config(self._config)}```", 0)
        kinds = (bool, int, float, str)
        settings = {
            path: value if isinstance(value, kinds) else str(value)
            for path, value in flat_settings(self._config).items()
            if value is not None
        }
        # By hand, because `add_hparams` would open a second run under the first.
        for summary in hparams(settings, {"val/loss": 0.0, "train/loss": 0.0}):
            self._writer._get_file_writer().add_summary(summary, 0)
        self._writer.flush()
