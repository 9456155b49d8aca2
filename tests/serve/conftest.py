import pytest
from served import GUIDANCE, make_model, serving

from qvgpt.serve.service import Service


@pytest.fixture(scope="session")
def model():
    return make_model()


@pytest.fixture(scope="package")
def server(model):
    with serving(Service(model, "tiny", guidance=GUIDANCE)) as running:
        yield running
