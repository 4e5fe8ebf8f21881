"""What rank 0 tells the other processes of a training, so that they need neither its files nor its command line."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumiere.config.loader import validate
from lumiere.config.schema import TrainingConfig
from lumiere.distributed import ProcessGroup, TorchrunGroup
from lumiere.errors import ConfigError, LumiereError
from lumiere.persistence.checkpoint import GROUPS, Checkpoint
from lumiere.persistence.runs import Run
from lumiere.training.parallel import own_device
from lumiere.training.setup import TrainingSetup, set_up
from lumiere.training.trainer import TrainingResult, train

if TYPE_CHECKING:
    import torch

MAX_SUGGESTIONS = 8


def check_shares(settings: TrainingConfig, device: "torch.device", processes: ProcessGroup) -> None:
    """Refuse what the processes cannot share evenly.

    Raises:
        ConfigError: if the batch does not divide by the processes, and by the accumulation steps of each.
        LumiereError: if they cannot share this kind of device.
    """
    own_device(device, processes)
    size, parts = settings.batch_size, settings.gradient_accumulation_steps
    unit = processes.size * parts
    if size % unit == 0:
        return
    each = f" with {parts} accumulation steps each" if parts > 1 else ""
    fitting = [number for number in range(1, size // parts + 1) if size % (number * parts) == 0][-MAX_SUGGESTIONS:]
    sizes = sorted({max(1, size // unit) * unit, -(-size // unit) * unit})
    raise ConfigError(
        f"training.batch_size {size} cannot be shared evenly by {processes.size} processes{each}",
        f"numbers of processes that fit: {', '.join(map(str, fitting))}; batch sizes that fit: "
        f"{', '.join(map(str, sizes))}",
    )


def hand_out(setup: TrainingSetup, run: Run, checkpoint: Checkpoint | None, processes: ProcessGroup) -> None:
    """Tell the others what to train, and wait until all have read the corpus."""
    if not isinstance(processes, TorchrunGroup):
        return
    values = setup.config.model_dump()
    # As they came out here: what `auto` finds on another machine may be something else.
    taken = {
        "device": setup.device.type,
        "precision": str(setup.precision).removeprefix("torch."),
        "loggers": [],
    }
    task = {
        "config": values | {"training": values["training"] | taken},
        "corpus_sha256": setup.corpus.fingerprint,
        "run": str(run.path),
        "checkpoint": None if checkpoint is None else outline(checkpoint),
    }
    processes.send_task(json.dumps(task))
    processes.connect(setup.config.training.rank_timeout)
    if checkpoint is not None and checkpoint.folder is None:
        for group in GROUPS:
            for tensor in getattr(checkpoint, group).values():
                processes.broadcast_tensor(tensor.contiguous())


def dismiss(processes: ProcessGroup) -> None:
    """Tell the others that there is nothing to train."""
    if isinstance(processes, TorchrunGroup):
        processes.send_task("")


def follow(processes: TorchrunGroup) -> TrainingResult | None:
    """Train what rank 0 hands out; None where there is nothing to train.

    Raises:
        LumiereError: as `prepare` and `train`, or the corpus that this process reads is another one.
    """
    text = processes.receive_task()
    if not text:
        return None
    task = json.loads(text)
    config = validate(task["config"])
    setup = set_up(config)
    if setup.corpus.fingerprint != task["corpus_sha256"]:
        raise LumiereError(
            f"the corpus '{config.dataset.name}' is not the one that rank 0 reads", "give all machines the same files"
        )
    setup = replace(setup, device=own_device(setup.device, processes))
    processes.connect(config.training.rank_timeout)
    checkpoint = None if task["checkpoint"] is None else received(task["checkpoint"], processes)
    result = train(
        config,
        setup.corpus,
        Run(Path(task["run"])),
        setup.device,
        setup.precision,
        setup.peak_flops * processes.size,
        checkpoint=checkpoint,
        processes=processes,
    )
    processes.barrier()
    return result


def outline(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint without its numbers: metadata, and names, types and shapes; or the folder that each reads itself."""
    if checkpoint.folder is not None:
        return {"metadata": checkpoint.metadata, "folder": str(checkpoint.folder.absolute())}
    tensors = {
        group: {
            name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            for name, tensor in getattr(checkpoint, group).items()
        }
        for group in GROUPS
    }
    return {"metadata": checkpoint.metadata, "tensors": tensors}


def received(outlined: Mapping[str, Any], processes: ProcessGroup) -> Checkpoint:
    """The checkpoint of an outline, with the numbers that rank 0 sends."""
    import torch

    if "folder" in outlined:
        return Checkpoint({}, metadata=outlined["metadata"], folder=Path(outlined["folder"]))
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for group in GROUPS:
        groups[group] = {}
        for name, (dtype, shape) in outlined["tensors"][group].items():
            groups[group][name] = torch.empty(shape, dtype=getattr(torch, dtype))
            processes.broadcast_tensor(groups[group][name])
    return Checkpoint(groups["model"], groups["optimizer"], groups["rng"], outlined["metadata"])
