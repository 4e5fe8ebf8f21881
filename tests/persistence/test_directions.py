"""Files of directions: round trip, what is refused, and the form of `--steer`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lumiere.errors import LumiereError
from lumiere.persistence.directions import Direction, Origin, check_fits, load_direction, parse_steer
from lumiere.persistence.loading import OpenedModel, open_model
from lumiere.persistence.runs import Run

ORIGIN = Origin("difference of means", 1, "run_a", "best", "hash", "hash of the tokenizer")


@pytest.fixture
def opened(trained_run: Run) -> OpenedModel:
    return open_model(trained_run.name, "best", "cpu", str(trained_run.path.parent))


def test_a_direction_survives_its_file(tmp_path: Path) -> None:
    direction = Direction(torch.arange(1.0, 5), torch.tensor([2.0, 3.0]), ORIGIN)
    direction.save(tmp_path / "a.safetensors")
    found = load_direction(tmp_path / "a.safetensors")
    assert (found.vector.tolist(), found.norms.tolist(), found.origin) == ([1, 2, 3, 4], [2, 3], ORIGIN)
    step = found.step(1, 0.5)
    assert float(step.norm()) == pytest.approx(1.5)
    assert torch.allclose(step / step.norm(), direction.vector / direction.vector.norm())


@pytest.mark.parametrize(
    "tensors",
    [
        {"vector": torch.zeros(4), "norms": torch.ones(2)},
        {"vector": torch.full((4,), torch.nan), "norms": torch.ones(2)},
        {"vector": torch.ones(2, 2), "norms": torch.ones(2)},
        {"vector": torch.ones(4, dtype=torch.int64), "norms": torch.ones(2)},
        {"vector": torch.ones(4), "norms": torch.ones(1)},
        {"vector": torch.ones(4)},
    ],
)
def test_a_file_without_a_direction_is_refused(tmp_path: Path, tensors: dict[str, Any]) -> None:
    path = tmp_path / "a.safetensors"
    Direction(torch.ones(4), torch.ones(2), ORIGIN).save(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    with pytest.raises(LumiereError, match="holds no direction"):
        load_direction(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(LumiereError, match="no file"):
        load_direction(path)
    for origin in ("[]", "{}", '{"layer": "1"}', "{"):
        save_file(
            {"vector": torch.ones(4), "norms": torch.ones(2)}, path, {"format": "lumiere direction 1", "origin": origin}
        )
        with pytest.raises(LumiereError, match="holds no direction"):
            load_direction(path)
    save_file({"vector": torch.ones(4), "norms": torch.ones(2)}, path)
    with pytest.raises(LumiereError, match="holds no direction"):
        load_direction(path)
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(LumiereError, match="holds no direction"):
        load_direction(path)


def test_a_direction_of_another_width_or_model_is_refused(opened: OpenedModel, tmp_path: Path) -> None:
    model = opened.model
    origin = replace(ORIGIN, weights_sha256=opened.weights_sha256)
    norms = torch.ones(model.num_layers)
    check_fits(Direction(torch.ones(model.embedding_size), norms, origin), opened, tmp_path)
    with pytest.raises(LumiereError, match="width 3"):
        check_fits(Direction(torch.ones(3), norms, origin), opened, tmp_path)
    with pytest.raises(LumiereError, match="other weights"):
        check_fits(Direction(torch.ones(model.embedding_size), norms, ORIGIN), opened, tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", None, 0.1)),
        ("a@b*c.safetensors@0-1*-2e-1", ("a@b*c.safetensors", "0-1", -0.2)),
        ("x/a.safetensors*0", ("x/a.safetensors", None, 0.0)),
        ("a.safetensors@-1", ("a.safetensors", "-1", 0.1)),
    ],
)
def test_the_form_of_steer(text: str, expected: tuple[str, str | None, float]) -> None:
    path, layers, scale = parse_steer(text)
    assert (str(path), layers, scale) == expected


@pytest.mark.parametrize(
    "text", ["", "a.npz", "a.safetensors@", "a.safetensors*", "a.safetensors*x", "a.safetensors*nan", "a.safetensors2"]
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(LumiereError):
        parse_steer(text)
