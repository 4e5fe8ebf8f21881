"""Lenses stored with a run: what comes back, what is refused, and what a push takes along."""

import shutil
from pathlib import Path

import pytest
import torch

from lumiere.errors import LumiereError
from lumiere.persistence.lenses import lens_names, lens_path, load_lens, save_lens
from lumiere.persistence.listing import is_known
from lumiere.persistence.runs import Run, RunStore
from lumiere.persistence.transfer import pull, push

TENSORS = {"matrices": torch.randn(2, 4, 4), "offsets": torch.randn(2, 4)}
ABOUT = {"weights_sha256": "a" * 64, "source": "text"}


@pytest.fixture
def run(trained_run: Run, tmp_path: Path) -> Run:
    folder = tmp_path / "runs" / trained_run.name
    shutil.copytree(trained_run.path, folder)
    return RunStore(folder.parent).open(trained_run.id)


def load(run: Run, weights: str = "a" * 64, shape: tuple[int, int] = (2, 4), step: int = 7) -> object:
    return load_lens(run, "tuned", step, weights, shape)


def test_what_is_saved_comes_back(run: Run) -> None:
    save_lens(run, "tuned", 7, TENSORS, ABOUT)
    save_lens(run, "tuned", 7, {name: 2 * value for name, value in TENSORS.items()}, ABOUT)
    tensors, about = load_lens(run, "tuned", 7, "a" * 64, (2, 4))
    assert about == ABOUT
    assert all(torch.equal(tensors[name], 2 * value) for name, value in TENSORS.items())
    assert lens_names(run) == ["tuned-step-00000007.safetensors"]
    assert [path.name for path in (run.path / "lenses").iterdir()] == lens_names(run)


def test_other_weights_steps_and_shapes_are_refused(run: Run) -> None:
    with pytest.raises(LumiereError):
        load(run)
    save_lens(run, "tuned", 7, TENSORS, ABOUT)
    for options in ({"weights": "b" * 64}, {"step": 8}, {"shape": (3, 4)}, {"shape": (2, 5)}):
        with pytest.raises(LumiereError):
            load(run, **options)  # pyright: ignore[reportArgumentType]


def test_damaged_files_are_refused(run: Run) -> None:
    path = save_lens(run, "tuned", 7, TENSORS, ABOUT)
    whole = path.read_bytes()
    for data in (b"", whole[:40], whole[:-1], b"\xff" * 64):
        path.write_bytes(data)
        with pytest.raises(LumiereError):
            load(run)
    nothing = {"matrices": torch.full((2, 4, 4), float("nan")), "offsets": torch.zeros(2, 4)}
    half = {name: value.half() for name, value in TENSORS.items()}
    for tensors, about in ((nothing, ABOUT), (half, ABOUT), (TENSORS, {}), (TENSORS, {"weights_sha256": 3})):
        save_lens(run, "tuned", 7, tensors, about)
        with pytest.raises(LumiereError):
            load(run)


def test_a_link_is_not_followed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (run.path / "lenses").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LumiereError):
        save_lens(run, "tuned", 7, TENSORS, ABOUT)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_push_takes_lenses_along(run: Run, tmp_path: Path) -> None:
    save_lens(run, "tuned", 7, TENSORS, ABOUT)
    (run.path / "lenses" / "notes.txt").write_text("mine")
    push(run, str(tmp_path / "place"))
    pull(RunStore(tmp_path / "there"), str(tmp_path / "place"), run.id)
    pulled = RunStore(tmp_path / "there").open(run.id)
    assert lens_path(pulled, "tuned", 7).read_bytes() == lens_path(run, "tuned", 7).read_bytes()
    assert [path.name for path in (pulled.path / "lenses").iterdir()] == lens_names(run)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("lenses/tuned-step-00000007.safetensors", True),
        ("lenses/jacobian-step-12345678901.safetensors", True),
        ("lenses/../tuned-step-00000007.safetensors", False),
        ("lenses/.tuned-step-00000007.safetensors", False),
        ("lenses/tuned-step-00000007.pt", False),
        ("lenses/notes.txt", False),
    ],
)
def test_names_of_a_run(name: str, known: bool) -> None:
    assert is_known(name) == known
