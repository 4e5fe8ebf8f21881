"""`run.inspect.save_activations`: activations of a whole split on disk, for analyses and training of one's own.

Importing this module loads neither torch nor numpy.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lumiere.api.analysis import model_provenance
from lumiere.api.options import RunAnalyses

if TYPE_CHECKING:
    from lumiere.interpret.activation_dataset import ActivationDataset
    from lumiere.interpret.activation_writer import Plan

DEFAULT_NAMES = "*.hook_resid_post"
SHARD_MB = 128


class SplitActivations(RunAnalyses):
    """Activations of a whole split of the corpus."""

    def save_activations(
        self,
        folder: str | Path,
        *,
        split: str = "validation",
        names: str | Sequence[str] | None = None,
        dtype: str = "float32",
        kind: str = "safetensors",
        shard_mb: int = SHARD_MB,
        progress: Callable[[int, int], None] = lambda done, total: None,
        announce: "Callable[[Plan, int], None]" = lambda planned, done: None,
    ) -> "ActivationDataset":
        """Write the activations of a whole split to a folder, shard by shard; the same call resumes it.

        Args:
            folder: A new one, or one that the same call has begun.
            names: Of activations with one row per position, or patterns. Default: the residual stream after each block.
            dtype: `float32` or `float16`.
            kind: `safetensors`, which `lumiere.open_activations` reads, or `parquet`, for `datasets`.
            shard_mb: Size of a shard, which is held in memory.
            progress: Called with the number of shards done, and of all.
            announce: Called with the plan and the number of shards that are there, before anything is written.

        Raises:
            LumiereError: There is no such split or activation, the folder holds other data, or the disk has no room.
        """
        from lumiere import __version__
        from lumiere.interpret.activation_writer import plan, write

        target = self._target(seed=0, verify=False)
        opened = target.opened
        windows = target.corpus().windows(split, opened.config)
        patterns = [names] if isinstance(names, str) else list(names or [DEFAULT_NAMES])
        about = {"lumiere_version": __version__, **model_provenance(opened)}
        about["device"] = str(opened.model.token_embedding.weight.device)
        what = plan(Path(folder), opened.model, windows, split, patterns, about, dtype, kind, shard_mb * 2**20)
        return write(opened.model, what, progress, announce)


def open_activations(folder: str | Path, verify: bool = False) -> "ActivationDataset":
    """Open activations that `save_activations` or `lumiere inspect cache --split` has written.

    Args:
        verify: Read all files and compare their hashes.

    Raises:
        LumiereError: The folder has none, is unfinished, or a file is missing, damaged or another one.
    """
    from lumiere.interpret.activation_dataset import ActivationDataset

    return ActivationDataset.open(folder, verify)
