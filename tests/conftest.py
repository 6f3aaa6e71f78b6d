from __future__ import annotations

import os
import sys

import pytest

os.environ.setdefault("RL_WARNINGS", "False")  # our trainer steps its target updater itself


@pytest.fixture(autouse=True)
def _no_compiled_code_of_other_tests():
    """All losses share one wrapper, which dynamo compiles anew eight times and then refuses."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
