"""Lumiere: train small GPT-style transformers and look inside them.

    import lumiere
    run = lumiere.open("latest")
    run.inspect.attention("Once upon a time")

docs/python.md describes what can be done from Python. Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lumiere.api.activations import open_activations as open_activations
    from lumiere.api.analysis import Analysis as Analysis
    from lumiere.api.importing import import_model as import_model
    from lumiere.api.runs import OpenedRun as OpenedRun
    from lumiere.api.runs import open_run as open  # noqa: A004, F401 (`lumiere.open`)
    from lumiere.api.training import train as train
    from lumiere.errors import LumiereError as LumiereError

__version__ = "0.1.0"

NAMES = {
    "Analysis": ("lumiere.api.analysis", "Analysis"),
    "LumiereError": ("lumiere.errors", "LumiereError"),
    "OpenedRun": ("lumiere.api.runs", "OpenedRun"),
    "import_model": ("lumiere.api.importing", "import_model"),
    "open": ("lumiere.api.runs", "open_run"),
    "open_activations": ("lumiere.api.activations", "open_activations"),
    "train": ("lumiere.api.training", "train"),
}
"""Module and name of what is imported when it is first used; `lumiere runs ls` would be slow otherwise."""


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, original = NAMES[name]
    return getattr(import_module(module), original)


def __dir__() -> list[str]:
    return [*NAMES, "__version__"]
