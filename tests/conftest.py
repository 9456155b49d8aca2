"""Types are checked; one thread: models of tests are tiny, and threads that wait cost more."""

import pytest
import typed

typed.install("qvgpt")

import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """The first calls count anew."""
    typed.Running.test += 1
