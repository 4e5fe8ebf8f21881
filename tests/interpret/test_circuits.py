"""The handcrafted induction circuit does what it was built for, seen through the model alone."""

import pytest
import torch

from lumiere.models.transformer import Transformer
from tests.interpret.circuits import CURRENT, DUPLICATE, FIRST, INDUCTION, PREVIOUS, UNIFORM, repeated_tokens

LENGTH = 15
TOKENS = torch.tensor([repeated_tokens(LENGTH, seed=seed) for seed in range(3)])
SECOND_COPY = range(LENGTH + 1, 2 * LENGTH + 1)
SOURCES = {
    PREVIOUS: (range(1, 2 * LENGTH + 1), lambda i: i - 1),
    FIRST: (range(1, 2 * LENGTH + 1), lambda i: 0),
    CURRENT: (range(1, 2 * LENGTH + 1), lambda i: i),
    DUPLICATE: (SECOND_COPY, lambda i: i - LENGTH),
    INDUCTION: (SECOND_COPY, lambda i: i - LENGTH + 1),
}


@pytest.mark.parametrize("place", SOURCES)
def test_each_head_looks_at_one_token_alone(circuit: Transformer, place: tuple[int, int]) -> None:
    with torch.no_grad():
        patterns = circuit(TOKENS).attention_weights[:, place[0], place[1]]
    destinations, source = SOURCES[place]
    for i in destinations:
        expected = torch.zeros(2 * LENGTH + 1)
        expected[source(i)] = 1
        torch.testing.assert_close(patterns[:, i], expected.expand(3, -1), atol=1e-6, rtol=0)


def test_a_head_without_a_match_is_uniform(circuit: Transformer) -> None:
    uniform = torch.ones(2 * LENGTH + 1, 2 * LENGTH + 1).tril()
    uniform /= uniform.sum(-1, keepdim=True)
    with torch.no_grad():
        output = circuit(TOKENS)
    patterns = output.attention_weights[0]
    torch.testing.assert_close(patterns[UNIFORM], uniform)
    for place in (INDUCTION, DUPLICATE):
        torch.testing.assert_close(patterns[place][1 : LENGTH + 1], uniform[1 : LENGTH + 1])
    assert torch.equal(output.logits.argmax(-1)[:, LENGTH + 1 : -1], TOKENS[:, LENGTH + 2 :])  # and yet copied
    assert float(output.logits[:, -2].max()) == pytest.approx(20, rel=0.01)
