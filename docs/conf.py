"""The site: `make docs` builds it into docs/_build/html; warnings are errors."""

from __future__ import annotations

import inspect
from typing import Any

import torchrl_sql

project = "torchrl_sql"
author = "The torchrl_sql authors"
release = torchrl_sql.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "torchrl_sql"
myst_heading_anchors = 3
suppress_warnings = [
    "myst.xref_missing",  # pages link to files of the repository, which stand beside them there
    "ref.python",  # attributes of one name in several classes, as `seed`
]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings give shapes and types
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "in_keys, out_keys"}
napoleon_custom_sections = ["Shape", "Reads", "Writes", "Legend"]


def _signature(app: Any, kind: str, name: str, thing: Any, options: Any, signature: Any, returns: Any) -> Any:
    """TorchRL's metaclasses hide the arguments of losses and replay buffers."""
    if kind != "class" or "__init__" not in vars(thing):
        return None
    parameters = list(inspect.signature(thing.__init__).parameters.values())[1:]
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return str(inspect.Signature(bare)), None


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", _signature)
