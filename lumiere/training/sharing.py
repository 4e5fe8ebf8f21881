"""What rank 0 tells the other processes of a training, so that they need neither its files nor its command line."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumiere.components.world import World
from lumiere.config.loader import validate
from lumiere.config.schema import TrainingConfig
from lumiere.errors import ConfigError, LumiereError
from lumiere.persistence.checkpoint import GROUPS, Checkpoint
from lumiere.persistence.runs import Run
from lumiere.training.distributed import own_device
from lumiere.training.preparation import Preparation, prepare
from lumiere.training.processes import JoinedWorld
from lumiere.training.trainer import TrainingResult, train

if TYPE_CHECKING:
    import torch

MAX_SUGGESTIONS = 8


def check_shares(settings: TrainingConfig, device: "torch.device", world: World) -> None:
    """Refuse what the processes cannot share evenly.

    Raises:
        ConfigError: if the batch does not divide by the processes, and by the accumulation steps of each.
        LumiereError: if they cannot share this kind of device.
    """
    own_device(device, world)
    size, parts = settings.batch_size, settings.gradient_accumulation_steps
    unit = world.size * parts
    if size % unit == 0:
        return
    each = f" with {parts} accumulation steps each" if parts > 1 else ""
    fitting = [number for number in range(1, size // parts + 1) if size % (number * parts) == 0][-MAX_SUGGESTIONS:]
    sizes = sorted({max(1, size // unit) * unit, -(-size // unit) * unit})
    raise ConfigError(
        f"training.batch_size {size} cannot be shared evenly by {world.size} processes{each}",
        f"numbers of processes that fit: {', '.join(map(str, fitting))}; batch sizes that fit: "
        f"{', '.join(map(str, sizes))}",
    )


def hand_out(preparation: Preparation, run: Run, checkpoint: Checkpoint | None, world: World) -> None:
    """Tell the others what to train, and wait until all have read the corpus."""
    if not isinstance(world, JoinedWorld):
        return
    values = preparation.config.model_dump()
    # As they came out here: what `auto` finds on another machine may be something else.
    taken = {
        "device": preparation.device.type,
        "precision": str(preparation.precision).removeprefix("torch."),
        "loggers": [],
    }
    task = {
        "config": values | {"training": values["training"] | taken},
        "corpus_sha256": preparation.corpus.fingerprint,
        "run": str(run.path),
        "checkpoint": None if checkpoint is None else outline(checkpoint),
    }
    world.send_task(json.dumps(task))
    world.connect(preparation.config.training.rank_timeout)
    if checkpoint is not None and checkpoint.folder is None:
        for group in GROUPS:
            for tensor in getattr(checkpoint, group).values():
                world.copy_from_first(tensor.contiguous())


def dismiss(world: World) -> None:
    """Tell the others that there is nothing to train."""
    if isinstance(world, JoinedWorld):
        world.send_task("")


def follow(world: JoinedWorld) -> TrainingResult | None:
    """Train what rank 0 hands out; None where there is nothing to train.

    Raises:
        LumiereError: as `prepare` and `train`, or the corpus that this process reads is another one.
    """
    text = world.receive_task()
    if not text:
        return None
    task = json.loads(text)
    config = validate(task["config"])
    preparation = prepare(config)
    if preparation.corpus.fingerprint != task["corpus_sha256"]:
        raise LumiereError(
            f"the corpus '{config.dataset.name}' is not the one that rank 0 reads", "give all machines the same files"
        )
    preparation = replace(preparation, device=own_device(preparation.device, world))
    world.connect(config.training.rank_timeout)
    checkpoint = None if task["checkpoint"] is None else received(task["checkpoint"], world)
    result = train(
        config,
        preparation.corpus,
        Run(Path(task["run"])),
        preparation.device,
        preparation.precision,
        preparation.peak_flops * world.size,
        checkpoint=checkpoint,
        world=world,
    )
    world.wait()
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


def received(outlined: Mapping[str, Any], world: World) -> Checkpoint:
    """The checkpoint of an outline, with the numbers that rank 0 sends."""
    import torch

    if "folder" in outlined:
        return Checkpoint({}, metadata=outlined["metadata"], folder=Path(outlined["folder"]))
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for group in GROUPS:
        groups[group] = {}
        for name, (dtype, shape) in outlined["tensors"][group].items():
            groups[group][name] = torch.empty(shape, dtype=getattr(torch, dtype))
            world.copy_from_first(groups[group][name])
    return Checkpoint(groups["model"], groups["optimizer"], groups["rng"], outlined["metadata"])
