"""The step through a compiler: the same logits, and a graceful way on where there is none."""

import shutil
from typing import Any

import pytest
import torch

from lumiere.generation.kv_cache import CachedDecoder, FullForward, compiled_step
from tests.generation.conftest import random_model


def test_where_nothing_compiles_it_says_so_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, **options: Any) -> Any:
        def call(*arguments: Any) -> Any:
            raise RuntimeError("no C++ compiler\nand a long tale")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    warnings: list[str] = []
    model = random_model("learned")
    decoder, slow = CachedDecoder(model, compiled_step=compiled_step(warnings.append)), FullForward(model)
    decoder.start([[3]])
    slow.start([[3]])
    for token in (4, 5, 6):
        torch.testing.assert_close(decoder.step([token]), slow.step([token]), atol=1e-4, rtol=0)
    assert warnings == ["torch.compile does not work here, continuing without it: no C++ compiler"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_compiled_step_gives_the_same_logits(positions: str) -> None:
    model = random_model(positions)
    decoder, slow = CachedDecoder(model, compiled_step=compiled_step(pytest.fail)), FullForward(model)
    rows = [[0, 3, 4], [5] * 9]
    decoder.start(rows)
    slow.start(rows)
    for step in range(30):
        tokens = [3 + step, 30 - step]
        torch.testing.assert_close(decoder.step(tokens), slow.step(tokens), atol=1e-4, rtol=0)
