"""The request to the C library: that it is made, and that it does what it is for."""

import os
import subprocess
import sys

import pytest

# Allocates and frees 64 MB in pieces, again and again, and prints how many pages the system had to map meanwhile.
PROGRAM = """
import resource, sys
import torch
from lumiere.device import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    return [torch.ones(2**19) for _ in range(32)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    # What glibc begins with. Said by the environment, because otherwise it may learn by itself to keep freed memory.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", PROGRAM, mode]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the request is one to glibc")
def test_freed_memory_stays_and_is_not_mapped_again() -> None:
    kept, given_back = page_faults("keep"), page_faults("default")
    assert kept < given_back / 10
