"""The model card's Python example runs as it is printed there."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lumiere.config.loader import load_config
from lumiere.persistence.checkpoint_manager import CheckpointManager
from lumiere.persistence.runs import RunStore
from lumiere.training.run import start
from lumiere.training.setup import set_up

RUN = "run_hiq6ihsb_20250819_001808"

EXAMPLE = f"""\
from lumiere.models.transformer import Transformer
from lumiere.persistence.checkpoint_manager import CheckpointManager
checkpoint = checkpoint_manager.load_checkpoint("{RUN}", "best")
model = Transformer(vocab_size=4096, embedding_size=128, context_size=64,
                    num_layers=4, num_heads=4, d_key=32, d_value=32, d_ff=256)
model.load_state_dict(checkpoint["model_state_dict"])
"""


@pytest.fixture
def card_run() -> None:
    """A run of the card's model under the card's name, on few stories and for two steps."""
    config = load_config("small", ["dataset={name: stories, num_documents: 5}"], {"training.max_steps": 2})
    result = start(set_up(config), RunStore())
    result.run.path.rename(Path("runs") / RUN)


@pytest.mark.usefixtures("card_run")
def test_the_cards_example() -> None:
    names: dict[str, Any] = {"checkpoint_manager": CheckpointManager()}
    exec(EXAMPLE, names)
    model = names["model"].eval()
    assert model.num_parameters == 1_188_992
    output = model(torch.arange(3, 13)[None])
    assert output.logits.shape == (1, 10, 4096)
    assert output.attention_weights.shape == (1, 4, 4, 10, 10)
    assert output.hidden_states.shape == (1, 5, 10, 128)

    same = RunStore().open("hiq6ihsb").load_model("best")
    assert torch.equal(same(torch.arange(3, 13)[None]).logits, output.logits)
    assert "\n".join(EXAMPLE.splitlines()[2:]) in (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
