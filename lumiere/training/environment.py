"""Where and with what a run is made, so that it can be understood long after."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lumiere


def environment() -> dict[str, Any]:
    """Versions, machine and the commit of a checkout, as `run.json` keeps them."""
    packages = ("torch", "numpy", "tokenizers", "datasets", "safetensors")
    return {
        "versions": {
            "lumiere": lumiere.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "commit": commit(),
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def commit() -> str | None:
    """The commit of the checkout that Lumiere runs from; None for an installed package."""
    folder = Path(lumiere.__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
