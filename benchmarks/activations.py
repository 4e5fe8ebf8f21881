"""Seconds, MB/s and peak memory of writing and reading activations of a whole split.

    python benchmarks/activations.py [--gb 1] [--folder FOLDER]

A random model of the card's shape (width 128, 4 layers) reads random tokens. The residual stream, the heads' outputs
and the neurons of each block are kept in float16, 6,160 bytes per token. Each row is measured in a process of its own,
for a quarter of the size and for the whole, so that growth of the memory shows. "private" is the peak of memory that
files do not back.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

NUM_LAYERS, WIDTH, CONTEXT, DOCUMENT = 4, 128, 64, 512
D_FF = 256
NAMES = ("blocks.*.hook_resid_*", "blocks.*.attn.hook_z", "blocks.*.mlp.hook_post")
ROW_BYTES = 2 * NUM_LAYERS * (4 * WIDTH + D_FF) + 16


def setup(num_bytes: int) -> tuple[Any, Any]:
    """Return the model and the windows that give about as many bytes."""
    import numpy as np
    import torch

    from lumiere.data.batches import Windows
    from lumiere.models.transformer import Transformer

    torch.manual_seed(0)
    model = Transformer(4096, WIDTH, CONTEXT, NUM_LAYERS, num_heads=4, d_key=32, d_value=32, d_ff=D_FF).eval()
    documents = num_bytes // (ROW_BYTES * (DOCUMENT - 1))
    ids = np.random.default_rng(0).integers(3, 4096, documents * DOCUMENT, dtype=np.uint16)
    return model, Windows(ids, np.arange(documents + 1) * DOCUMENT, CONTEXT, 8)


def act(action: str, folder: Path, num_bytes: int) -> int:
    """Do what one row of the table measures; return the bytes that were written or read."""
    from lumiere.interpret.activation_dataset import ActivationDataset
    from lumiere.interpret.activation_writer import plan, write

    if action.startswith("write"):
        model, windows = setup(num_bytes)
        kind = action.removeprefix("write ")
        planned = plan(folder, model, windows, "train", NAMES, {}, "float16", kind)
        return write(model, planned).num_bytes
    if action == "forward passes alone":
        import numpy as np
        import torch

        model, windows = setup(num_bytes)
        with torch.inference_mode():
            for first in range(0, len(windows), 64):
                indices = np.arange(first, min(first + 64, len(windows)))
                model.final_residual(torch.from_numpy(windows.cut(indices)[0][:, :-1].copy()))
        return num_bytes
    if action == "verify":
        return ActivationDataset.open(folder, verify=True).num_bytes
    dataset = ActivationDataset.open(folder)
    name = "blocks.2.hook_resid_post" if "one name" in action else None
    seed = 0 if "shuffled" in action else None
    return sum(
        sum(tensor.nbytes for tensor in batch.values()) for batch in dataset.batches(name, batch_size=4096, seed=seed)
    )


def private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def child(action: str, folder: Path, num_bytes: int) -> None:
    """Measure one row, and print it as JSON."""
    import resource

    import torch  # noqa: F401 (not to be measured)

    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    handled = act(action, folder, num_bytes)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "bytes": handled, "private": peak[0], "resident": resident}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        action, folder, num_bytes = arguments.child
        child(action, Path(folder), int(num_bytes))
        return
    place = Path(tempfile.mkdtemp(dir=arguments.folder))
    print(f"{os.cpu_count()} processors\n")
    print("| | MB | seconds | MB/s | peak memory, MB | private, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    try:
        for part in (0.25, 1.0):
            num_bytes = int(arguments.gb * 1e9 * part)
            for action, folder in (
                ("forward passes alone", "none"),
                ("write safetensors", "safetensors"),
                ("write parquet", "parquet"),
                ("verify", "safetensors"),
                ("read in order", "safetensors"),
                ("read shuffled", "safetensors"),
                ("read shuffled, one name", "safetensors"),
            ):
                where = str(place / f"{folder}-{num_bytes}")
                command = [sys.executable, __file__, "--child", action, where, str(num_bytes)]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                megabytes, seconds = found["bytes"] / 1e6, found["seconds"]
                print(
                    f"| {action} | {megabytes:,.0f} | {seconds:.1f} | {megabytes / seconds:,.0f} | "
                    f"{found['resident'] / 1e6:,.0f} | {found['private'] / 1e6:,.0f} |",
                    flush=True,
                )
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
