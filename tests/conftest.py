from __future__ import annotations

import os

os.environ.setdefault("RL_WARNINGS", "False")  # our trainer steps its target updater itself
