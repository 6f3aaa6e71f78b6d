"""What batch scripts start on the nodes: ``python -m torchrl_sql.cli.job GROUP INDEX``, see ``launch/job.py``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # Pending until there is a handler: importing takes seconds, and the default is to die.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    import logging

    from torchrl_sql.cli import run
    from torchrl_sql.launch.job import run_task

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    sys.exit(run_task(Path(sys.argv[1]), int(sys.argv[2]), run=run))
