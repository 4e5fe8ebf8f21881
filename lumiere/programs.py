"""Commands that work as printed, even if the Python environment is not active."""

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path


def program(name: str) -> str:
    """Return what starts `name` of this Python environment in a shell: its name if it is on the PATH, else its path."""
    installed = shutil.which(name, path=sysconfig.get_path("scripts"))
    if installed is None:
        return f"{_typed(sys.executable)} -m {name}"
    on_path = shutil.which(name)
    return name if on_path and os.path.samefile(on_path, installed) else _typed(installed)


def install_command(*requirements: str) -> str:
    """Return the command that installs packages into this environment.

    Name the packages themselves, never an extra of ours: `lumiere` on PyPI is another project.
    """
    return f"{program('pip')} install {shlex.join(requirements)}"


def _typed(path: str) -> str:
    """Return `path` relative to the current folder, with a separator; without one, a shell searches the PATH."""
    here = Path.cwd()
    if not Path(path).is_relative_to(here):
        return shlex.quote(path)
    relative = Path(path).relative_to(here)
    return shlex.quote(str(relative) if len(relative.parts) > 1 else os.path.join(os.curdir, relative))
