"""How processes divide the work of training, tested in one process."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from lumiere import distributed
from lumiere.cli.train import check_readable_by_all
from lumiere.config.schema import RunConfig
from lumiere.data.batches import batch_at, batches_in_order
from lumiere.data.dataset import TokenizedCorpus
from lumiere.distributed import SINGLE_PROCESS, ProcessGroup, TorchrunGroup, noticing_losses, share_cores
from lumiere.errors import ConfigError, LostProcessError, LumiereError
from lumiere.evaluation.loss import evaluate
from lumiere.models.transformer import build_model
from lumiere.persistence.checkpoint import Checkpoint
from lumiere.persistence.record import RunRecord
from lumiere.persistence.runs import RunStore
from lumiere.training.parallel import local_device, seed_dropout
from lumiere.training.run import check_agreement, dismiss, follow, resume_warnings, start
from lumiere.training.setup import check_shares, set_up, set_up_rank
from lumiere.training.state import NUMERICS
from tests.training.short import CPU, short


@pytest.mark.parametrize("num_shares", [2, 3, 8])
def test_the_shares_of_a_step_are_its_batch(
    tiny_config: RunConfig, tiny_corpus: TokenizedCorpus, num_shares: int
) -> None:
    windows = tiny_corpus.windows("train", tiny_config)
    batch_size = len(windows) - 3  # so that the second step of the epoch has 3 windows
    for step in range(2):
        whole = batch_at(step, windows, batch_size, seed=1)
        shares = [batch_at(step, windows, batch_size, 1, rank, num_shares) for rank in range(num_shares)]
        assert {share.num_targets for share in shares} == {whole.num_targets}
        assert sum(int((share.targets >= 0).sum()) for share in shares) == whole.num_targets
        filled = [share for share in shares if (share.targets >= 0).any()]
        assert torch.equal(torch.cat([share.tokens for share in filled]), whole.tokens)
        assert torch.equal(torch.cat([share.targets for share in filled]), whole.targets)
        assert max(len(share.tokens) for share in filled) - min(len(share.tokens) for share in filled) <= 1


def test_a_shared_evaluation_is_the_same(tiny_config: RunConfig, tiny_corpus: TokenizedCorpus) -> None:
    """To the last bit, though each process scores other batches, and one of four none at all."""
    windows = tiny_corpus.windows("validation", tiny_config)
    batch_size = -(-len(windows) // 3)
    facts, model = tiny_corpus.splits["validation"].facts, build_model(tiny_config)
    parts: list[torch.Tensor] = []

    class Recording(ProcessGroup):
        def all_reduce_tensor(self, values: torch.Tensor) -> torch.Tensor:
            parts.append(values)
            return values + (torch.stack(parts[:-1]).sum(0) if len(parts) > 1 else 0)

    # Each makes the same number of forward passes, which a model with sharded weights needs.
    batches = [list(batches_in_order(windows, batch_size, rank, 4)) for rank in range(4)]
    assert [batch.num_targets > 0 for (batch,) in batches] == [True, True, True, False]
    # Only the last one has the sums of all others.
    *_, shared = [evaluate(model, windows, facts, batch_size, Recording(rank, 4)) for rank in range(4)]
    assert replace(shared, seconds=0.0) == replace(evaluate(model, windows, facts, batch_size), seconds=0.0)
    assert shared.num_batches == 3


def test_masks_depend_on_seed_step_and_rank_only() -> None:
    def drawn(seed: int, step: int, rank: int) -> float:
        torch.rand(rank + 1)  # whatever was drawn before
        seed_dropout(seed, step, ProcessGroup(rank, 2))
        return torch.rand(()).item()

    first = drawn(0, 0, 0)
    assert drawn(0, 0, 0) == first
    assert len({first, drawn(1, 0, 0), drawn(0, 1, 0), drawn(0, 0, 1)}) == 4
    before = torch.get_rng_state()
    seed_dropout(0, 5, SINGLE_PROCESS)
    assert torch.equal(torch.get_rng_state(), before), "a single process keeps its generator"


@pytest.mark.parametrize(("size", "parts", "num_processes"), [(32, 1, 3), (12, 2, 4), (8, 1, 16)])
def test_suggestions_for_an_uneven_batch_work(size: int, parts: int, num_processes: int) -> None:
    settings = short(batch_size=size, gradient_accumulation_steps=parts)
    with pytest.raises(ConfigError, match=f"batch_size {size} cannot be shared evenly by {num_processes}") as raised:
        start(set_up(settings), RunStore(), processes=ProcessGroup(0, num_processes))
    assert not RunStore().all()
    numbers, sizes = (part.partition(": ")[2].split(", ") for part in str(raised.value.hint).split("; "))
    for number in map(int, numbers):
        check_shares(settings.training, CPU, ProcessGroup(0, number))
    for fitting in map(int, sizes):
        changed = short(batch_size=fitting, gradient_accumulation_steps=parts)
        check_shares(changed.training, CPU, ProcessGroup(0, num_processes))


def test_a_gpu_for_each_process_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert local_device(torch.device("cuda"), ProcessGroup(3, 4, 1, 2)) == torch.device("cuda:1")
    assert taken == [torch.device("cuda:1")]
    assert local_device(torch.device("cuda:1"), SINGLE_PROCESS) == torch.device("cuda:1")
    with pytest.raises(LumiereError, match="3 processes on a machine with 2 GPUs"):
        local_device(torch.device("cuda"), ProcessGroup(2, 3, 2, 3))
    with pytest.raises(LumiereError, match="not on mps"):
        local_device(torch.device("mps"), ProcessGroup(0, 2))


@pytest.mark.parametrize(("asked", "threads"), [("1", 4), ("3", None), (None, None)])
def test_cores_are_shared_unless_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, threads: int | None
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(distributed, "num_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    share_cores(ProcessGroup(0, 2, 0, 2))
    assert chosen == ([] if threads is None else [threads])


def test_only_errors_about_other_processes_are_translated() -> None:
    with pytest.raises(LostProcessError, match="another of the 2 processes"), noticing_losses(ProcessGroup(0, 2)):
        raise RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer")
    with pytest.raises(RuntimeError, match="shapes") as raised, noticing_losses(ProcessGroup(0, 2)):
        raise RuntimeError("shapes differ")
    assert not isinstance(raised.value, LumiereError)


@pytest.mark.parametrize(
    ("metadata", "before", "size", "after", "dropout", "expected"),
    [
        ({"world_size": 2}, "ddp", 2, "ddp", 0.1, []),
        ({"world_size": 1}, "ddp", 1, "fsdp", 0.1, []),  # one process shares with nobody
        ({}, "ddp", 1, "ddp", 0.1, []),  # saved before there were several
        ({}, "ddp", 2, "ddp", 0.1, ["1 process, now with 2 processes (ddp)", "masks"]),
        ({"world_size": 4}, "fsdp", 1, "fsdp", 0.0, ["4 processes (fsdp), now with 1 process:"]),
        ({"world_size": 2}, "fsdp", 2, "ddp", 0.1, ["(fsdp), now with 2 processes (ddp):"]),
        ({"numerics": 1, "lumiere_version": "0.1"}, "ddp", 1, "ddp", 0.1, ["version 0.1"]),
    ],
)
def test_what_a_resume_cannot_keep(
    metadata: dict[str, Any], before: str, size: int, after: str, dropout: float, expected: list[str]
) -> None:
    old, new = (short({"model.dropout": dropout}, parallel=way) for way in (before, after))
    saved = {"config": old.model_dump(), "numerics": NUMERICS} | metadata
    record = RunRecord(device="cpu", precision="float32")
    warnings = resume_warnings(Checkpoint({}, metadata=saved), "latest", set_up(new), record, ProcessGroup(0, size))
    assert len(warnings) == bool(expected)
    assert all(part in warnings[0] for part in expected)
    assert ("masks" in "".join(warnings)) == ("masks" in expected)


class Ranks(ProcessGroup):
    """Rank 0 or 1 of two, beside a rank whose facts are given: rank 0 states its own, rank 1 hears those of rank 0."""

    def __init__(self, rank: int, first: dict[str, str], second: dict[str, str]) -> None:
        super().__init__(rank, 2)
        self.stated = iter(first.values())
        self.differing = iter(first[name] != second[name] for name in first)

    def broadcast_text(self, text: str | None = None) -> str:
        return next(self.stated)

    def all_reduce_max(self, value: int) -> int:
        differs = next(self.differing)
        assert value == (1 if differs and self.rank == 1 else 0)
        return 1 if differs else 0


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["corpus", "tokenizer", "config", "checkpoint"])
def test_all_ranks_refuse_what_one_of_them_reads_differently(name: str, rank: int) -> None:
    first = {"corpus": "a", "tokenizer": "b", "config": "c", "checkpoint": "d"}
    check_agreement(first, Ranks(rank, first, first))
    second = first | {name: "other"}
    with pytest.raises(LumiereError, match=f"rank 1 of 2 reads another {name}"):
        check_agreement([first, second][rank], Ranks(rank, first, second))


def test_a_fingerprint_depends_on_what_is_trained_but_not_where() -> None:
    setup = set_up(short())
    fingerprint = setup.fingerprint()
    moved = set_up_rank(setup.config, {"device": "cpu", "precision": "bfloat16"})
    assert moved.precision == torch.bfloat16
    assert moved.fingerprint() == fingerprint
    other = replace(setup, config=short(learning_rate=0.5))
    assert other.fingerprint() == fingerprint | {"config": other.fingerprint()["config"]}
    assert other.fingerprint() != fingerprint


def test_a_rank_without_the_run_names_the_folder_and_one_with_nothing_to_train_ends(tmp_path: Path) -> None:
    processes = TorchrunGroup(ProcessGroup(1, 2), store := HashStore())
    choice = {"run": "run_aaaaaaaa_20250819_001808", "resumes": False, "device": "cpu", "precision": "float32"}
    store.set("choice 0", json.dumps(choice))
    runs = RunStore(tmp_path / "elsewhere")
    with pytest.raises(LumiereError, match="run_aaaaaaaa") as raised:
        follow(short(), runs, {}, processes)
    assert str(runs.runs_dir) in (raised.value.hint or "")
    dismiss(processes)
    assert follow(None, runs, {}, processes) is None


def test_several_processes_need_a_config_in_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    for config in (str(pipe), "-"):
        check_readable_by_all(config, SINGLE_PROCESS)
        with pytest.raises(LumiereError, match="2 processes"):
            check_readable_by_all(config, ProcessGroup(0, 2))
    check_readable_by_all("tiny", ProcessGroup(0, 2))
