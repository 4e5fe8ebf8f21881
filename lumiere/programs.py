"""Commands that work as printed, also while the Python environment is not active."""

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path


def program(name: str) -> str:
    """What to type in a shell to start `name` of this Python environment: its name if on the PATH, else its path."""
    installed = shutil.which(name, path=sysconfig.get_path("scripts"))
    if installed is None:
        return f"{_typed(sys.executable)} -m {name}"
    on_path = shutil.which(name)
    return name if on_path and os.path.samefile(on_path, installed) else _typed(installed)


def install_command(*requirements: str) -> str:
    """The command that installs packages into this environment.

    The packages themselves, never an extra of ours: the name `lumiere` on PyPI belongs to another project.
    """
    return f"{program('pip')} install {shlex.join(requirements)}"


def _typed(path: str) -> str:
    """`path` as typed from the current folder, with a separator in it, without which a shell searches the PATH."""
    here = Path.cwd()
    if not Path(path).is_relative_to(here):
        return shlex.quote(path)
    relative = Path(path).relative_to(here)
    return shlex.quote(str(relative) if len(relative.parts) > 1 else os.path.join(os.curdir, relative))
