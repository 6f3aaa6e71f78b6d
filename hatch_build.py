"""Compiles ``torchrl_sql/data/gather.c`` when the package is built or installed, if there is a C compiler.

Without one the package works, too: frames are then decoded in Python.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("torchrl_sql", "data", "gather.c")
LIBRARY = SOURCE.with_name("_gather.so")


class NativeGather(BuildHookInterface):
    """Adds the compiled library to the wheel, which is then of this platform and of every Python version."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles into the source tree, so that an editable installation has it, too."""
        library = Path(self.root) / LIBRARY
        compiler = shlex.split(os.environ.get("CC", "cc"))
        command = [*compiler, "-O3", "-shared", "-fPIC", "-o", str(library), str(Path(self.root) / SOURCE)]
        try:
            library.unlink(missing_ok=True)
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"{SOURCE} was not compiled, frames will be decoded in Python: {error}")
            return
        build_data["artifacts"].append(str(LIBRARY))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
