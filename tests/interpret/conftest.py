"""Fixtures of the tests of analyses. All models are shared: copy one before changing it."""

import pytest

from lumiere.models.transformer import Transformer
from lumiere.persistence.runs import Run
from tests.interpret.circuits import induction_circuit
from tests.interpret.models import exact, random_model


@pytest.fixture(scope="session")
def trained(trained_run: Run) -> Transformer:
    return trained_run.load_model("best").eval()


@pytest.fixture(scope="session", params=["learned", pytest.param("rotary", marks=pytest.mark.slow), "trained"])
def model(request: pytest.FixtureRequest, trained: Transformer) -> Transformer:
    """A random model with learned or rotary positions, or a trained one, in float32."""
    return trained if request.param == "trained" else random_model(positions=request.param)


@pytest.fixture(scope="session")
def exact_model(model: Transformer) -> Transformer:
    """The same in float64."""
    return exact(model)


@pytest.fixture(scope="session")
def circuit() -> Transformer:
    return induction_circuit()
