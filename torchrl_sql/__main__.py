"""``python -m torchrl_sql``: the command ``torchrl-sql``."""

import sys

from torchrl_sql.cli import main

sys.exit(main())
