"""`lumiere.import_model`: make a run of a model from elsewhere, from Python."""

from collections.abc import Sequence
from pathlib import Path

from lumiere.api.runs import OpenedRun
from lumiere.persistence.notes import add_tags, check_tag
from lumiere.persistence.runs import RunStore


def import_model(
    source: str | Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    context_size: int | None = None,
    verify: bool | None = None,
    runs_dir: str | Path | None = None,
    command: Sequence[str] = ("lumiere.import_model",),
) -> OpenedRun:
    """Make a run of a model from elsewhere, and open it; docs/importing.md says what can be imported.

    Args:
        source: A folder in the form of Hugging Face, a name on its Hub, a GGUF file, or a state dict.
        name: Tag of the run, which then names it.
        revision: Branch, tag or commit on the Hub.
        context_size: Maximum number of positions; at most the source's, which is the default.
        verify: Whether to compare the log-probabilities with those of `transformers`. Default: if it is installed.
        runs_dir: Default: `LUMIERE_RUNS_DIR`, or `runs` in the current folder.
        command: What the user typed, for the record.

    Raises:
        LumiereError: As `lumiere.importing.importing.import_model`, or `name` is not a tag. No run is made.
    """
    if name is not None:
        check_tag(name)
    from lumiere.importing import importing

    run = importing.import_model(
        str(source),
        RunStore(runs_dir),
        revision=revision,
        context_size=context_size,
        verified=verify,
        command=command,
    )
    if name is not None:
        add_tags(run, [name])
    return OpenedRun(run)
