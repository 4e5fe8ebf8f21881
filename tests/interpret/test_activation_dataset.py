"""Activations of a split on disk against the model's own, and what happens to an interrupted or damaged folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lumiere.components.hooks import run_with_cache
from lumiere.data.batches import Windows
from lumiere.errors import LumiereError
from lumiere.interpret import activation_writer
from lumiere.interpret.activation_dataset import COLUMNS, ActivationDataset
from lumiere.interpret.activation_writer import Plan, plan, write
from tests.interpret.models import random_model

NAMES = ("*hook_resid_post", "blocks.1.attn.hook_z", "blocks.0.mlp.hook_post")
LENGTHS = [25, 2, 11, 1, 40, 12, 3]
"""Of the documents; a window has 11 tokens, three of them shared with the window before."""
CONTEXT, SHARED = 10, 3


def make_windows(shared: int = SHARED, only_last: bool = False) -> Windows:
    ids = np.random.default_rng(0).integers(3, 20, sum(LENGTHS))
    return Windows(ids, np.cumsum([0, *LENGTHS]), CONTEXT, shared, only_last=only_last)


def make_plan(folder: Path, windows: Windows | None = None, **options: Any) -> Plan:
    about = {"run": options.pop("run", "run_a")}
    options = {"shard_bytes": 5000, **options}
    names = options.pop("names", NAMES)
    return plan(folder, random_model(), windows or make_windows(), "validation", names, about, **options)


@pytest.fixture(autouse=True)
def two_windows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_writer, "TOKENS_AT_ONCE", 2 * CONTEXT)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shared", [0, 1, SHARED])
def test_rows_are_the_activations_of_each_position_once(shared: int, tmp_path: Path) -> None:
    windows = make_windows(shared)
    written = write(random_model(), make_plan(tmp_path, windows))
    assert len(written.shards) > 3
    dataset = ActivationDataset.open(tmp_path, verify=True)
    assert dataset == written
    found = dataset.rows(np.arange(len(dataset)))
    model, seen = random_model(), set()
    for row in range(len(dataset)):
        window, document, position = (int(found[name][row]) for name in ("window", "document", "position"))
        tokens, lengths = windows.cut(np.array([window]))
        assert found["token"][row] == tokens[0, position]
        assert document == windows.documents(np.array([window]))[0]
        inputs = torch.from_numpy(tokens[:, : min(int(lengths[0]), CONTEXT)])
        with torch.no_grad():
            _, cache = run_with_cache(model, inputs, list(NAMES))
        for name in dataset.shapes:
            torch.testing.assert_close(found[name][row], cache[name][0, position])
        first = int(np.flatnonzero(windows.documents(np.arange(len(windows))) == document)[0])
        seen.add((document, (window - first) * windows.stride + position))
    assert len(seen) == len(dataset)
    expected = {(document, place) for document, length in enumerate(LENGTHS) for place in range(length - 1)}
    if shared == 0:  # the token between two windows is predicted, and nothing is predicted from it
        expected = {(document, place) for document, place in expected if place % 11 != 10}
    assert seen == expected


def test_the_last_token_of_each_document_is_the_only_window(tmp_path: Path) -> None:
    windows = make_windows(only_last=True)
    dataset = write(random_model(), make_plan(tmp_path, windows))
    lengths = windows.lengths(np.arange(len(windows)))
    assert len(dataset) == int((lengths - 1).sum())


@pytest.mark.parametrize("kind", ["safetensors", "parquet"])
def test_a_resumed_folder_is_that_of_an_uninterrupted_run(kind: str, tmp_path: Path) -> None:
    write(random_model(), make_plan(tmp_path / "whole", kind=kind))

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    planned = make_plan(tmp_path / "resumed", kind=kind)
    with pytest.raises(KeyboardInterrupt):
        write(random_model(), planned, stop)
    assert "activations.json" not in bytes_of(tmp_path / "resumed")
    with pytest.raises(LumiereError, match="unfinished"):
        ActivationDataset.open(tmp_path / "resumed")
    (tmp_path / f"resumed/data/.{planned.file(2)}.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / "resumed/data" / planned.file(2)).write_bytes(b"not in the list: killed after it was renamed")
    calls: list[int] = []
    write(random_model(), planned, lambda done, total: calls.append(done))
    assert calls[0] == 2
    assert bytes_of(tmp_path / "resumed") == bytes_of(tmp_path / "whole")
    write(random_model(), planned, lambda done, total: calls.append(-done))
    assert calls[-1] == -len(planned.rows_per_shard)
    assert bytes_of(tmp_path / "resumed") == bytes_of(tmp_path / "whole")


def test_a_deleted_shard_is_written_again(tmp_path: Path) -> None:
    planned = make_plan(tmp_path)
    write(random_model(), planned)
    whole = bytes_of(tmp_path)
    (tmp_path / "data" / planned.file(1)).unlink()
    with pytest.raises(LumiereError, match=r"validation-00001-of.*is missing"):
        ActivationDataset.open(tmp_path)
    write(random_model(), planned)
    assert bytes_of(tmp_path) == whole


def test_damaged_and_foreign_shards_are_named(tmp_path: Path) -> None:
    planned = make_plan(tmp_path)
    write(random_model(), planned)
    path = tmp_path / "data" / planned.file(1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    ActivationDataset.open(tmp_path)  # sizes alone do not tell
    for act in (lambda: ActivationDataset.open(tmp_path, verify=True), lambda: write(random_model(), planned)):
        with pytest.raises(LumiereError, match="validation-00001-of"):
            act()
    path.write_bytes(data[:-1])
    with pytest.raises(LumiereError, match="validation-00001-of"):
        ActivationDataset.open(tmp_path)
    # Of the same size, with other names.
    path.write_bytes(bytes(data).replace(b"blocks.0.hook_resid_post", b"blocks.9.hook_resid_post"))
    with pytest.raises(LumiereError, match="validation-00001-of"):
        list(ActivationDataset.open(tmp_path).batches())


def test_other_folders_are_refused_and_stay_as_they_are(tmp_path: Path) -> None:
    write(random_model(), make_plan(tmp_path / "a"))
    before = bytes_of(tmp_path / "a")
    options: dict[str, dict[str, Any]] = {
        "dtype float32": {"dtype": "float16"}, "run run_a": {"run": "run_b"}, "names": {"names": ["hook_embed"]},
        "format": {"kind": "parquet"},
    }  # fmt: skip
    for named, changes in options.items():
        with pytest.raises(LumiereError, match=named):
            write(random_model(), make_plan(tmp_path / "a", **changes))
    assert bytes_of(tmp_path / "a") == before
    (tmp_path / "a/data/notes.txt").write_text("mine")
    with pytest.raises(LumiereError, match=r"data/notes\.txt"):
        write(random_model(), make_plan(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.txt").write_text("mine")
    for name in ("b", "b/thesis.txt"):
        with pytest.raises(LumiereError):
            write(random_model(), make_plan(tmp_path / name))
    assert bytes_of(tmp_path / "b") == {"thesis.txt": b"mine"}
    with pytest.raises(LumiereError, match=r"has no activations\.json"):
        ActivationDataset.open(tmp_path / "b")


def test_room_is_checked_before_the_first_byte(tmp_path: Path) -> None:
    planned = make_plan(tmp_path / "a")
    with pytest.raises(LumiereError, match="more than are free"):
        write(random_model(), replace(planned, rows_per_shard=(10**15,)))
    assert not (tmp_path / "a").exists()


def test_the_size_is_known_beforehand(tmp_path: Path) -> None:
    planned = make_plan(tmp_path, dtype="float16")
    dataset = write(random_model(), planned)
    headers = sum(len(data) for name, data in bytes_of(tmp_path).items() if name.startswith("data")) - planned.num_bytes
    assert 0 < headers < 2000 * len(dataset.shards)


def test_float16_holds_the_nearest_numbers_or_is_refused(tmp_path: Path) -> None:
    exact = write(random_model(), make_plan(tmp_path / "32")).rows(np.arange(50))
    half = write(random_model(), make_plan(tmp_path / "16", dtype="float16")).rows(np.arange(50))
    for name, values in half.items():
        expected = exact[name] if name in COLUMNS else exact[name].half()
        assert torch.equal(values, expected)
    model = random_model()
    with torch.no_grad():
        model.get_parameter("blocks.1.feedforward.down.weight").mul_(1e7)
    with pytest.raises(LumiereError, match=r"blocks\.1\.hook_resid_post has values up to"):
        write(model, make_plan(tmp_path / "large", dtype="float16"))
    assert not (tmp_path / "large").exists()


def test_activations_without_a_row_per_position_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LumiereError, match=r"blocks\.0\.attn\.hook_pattern has the axes H T S"):
        make_plan(tmp_path, names=["blocks.0.attn.hook_pattern"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_datasets_reads_parquet(dtype: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    expected = write(random_model(), make_plan(tmp_path / "a", dtype=dtype))
    written = write(random_model(), make_plan(tmp_path / "b", dtype=dtype, kind="parquet"))
    cache = str(tmp_path / "cache")
    found = datasets.load_dataset(str(tmp_path / "b"), cache_dir=cache)["validation"].with_format("numpy")[:]
    for name, values in expected.rows(np.arange(len(expected))).items():
        np.testing.assert_array_equal(found[name], values.numpy())
    with pytest.raises(LumiereError, match="Parquet"):
        written.rows(np.arange(2))


def test_batches_are_all_rows_in_an_order_of_the_seed(tmp_path: Path) -> None:
    dataset = write(random_model(), make_plan(tmp_path))
    name = "blocks.1.attn.hook_z"
    whole = dataset.rows(np.arange(len(dataset)))

    def read(seed: Any) -> dict[str, torch.Tensor]:
        batches = list(dataset.batches(name, batch_size=7, seed=seed))
        assert all(len(batch["token"]) == 7 for batch in batches[:-1])
        assert set(batches[0]) == {name, *COLUMNS}
        return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}

    in_order, first, second = read(None), read(1), read(2)
    assert all(torch.equal(in_order[key], whole[key]) for key in in_order)
    assert all(torch.equal(values, first[key]) for key, values in read(1).items())
    assert not torch.equal(first[name], second[name])
    place = {
        (window, position): row
        for row, (window, position) in enumerate(zip(whole["window"].tolist(), whole["position"].tolist(), strict=True))
    }
    rows = [place[key] for key in zip(first["window"].tolist(), first["position"].tolist(), strict=True)]
    assert sorted(rows) == list(range(len(dataset)))
    assert torch.equal(first[name], whole[name][rows])
    with pytest.raises(LumiereError, match="hook_zz"):
        next(dataset.batches("blocks.1.attn.hook_zz"))


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    write(random_model(), make_plan(tmp_path))
    path = tmp_path / "activations.json"
    values = json.loads(path.read_text())
    outside = [values["shards"][0] | {"file": "../../secret-00000-of-00001.safetensors"}]
    for change in ({"dtype": "int8"}, {"shards": outside}, {"num_rows": -1}, {"shapes": {"a": ["b"]}}, {"format": []}):
        path.write_text(json.dumps(values | change))
        with pytest.raises(LumiereError, match="damaged"):
            ActivationDataset.open(tmp_path)
    path.write_text(json.dumps(values | {"num_rows": values["num_rows"] + 1}))
    with pytest.raises(LumiereError, match="add up"):
        ActivationDataset.open(tmp_path)
    path.write_text(json.dumps(values | {"format_number": 2}))
    with pytest.raises(LumiereError, match="newer"):
        ActivationDataset.open(tmp_path)
