from __future__ import annotations

import os
import sys

import pytest

os.environ.setdefault("RL_WARNINGS", "False")  # our trainer steps its target updater itself


@pytest.fixture(autouse=True)
def _no_compiled_code_of_other_tests():
    """Dynamo counts recompilations per function, and different losses are called through the same ones: without this, a
    test could meet the limit of eight that others used up."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
