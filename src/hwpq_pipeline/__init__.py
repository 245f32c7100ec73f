"""Compress a causal language model into variants that load in stock engines, and compare what each costs.

`compress` and `load` are the door for Python (docs/python.md). The pipelines are run by `kedro run`, with the
configuration in `conf/base`. The rooms and the one direction of their imports are told in `docs/architecture.md`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwpq_pipeline.api import Compressed, compress, load

__version__ = "0.1.0"
__all__ = ["Compressed", "compress", "load"]

# Nothing here reports to anybody. Each tool reads a variable of its own, when it is first imported; a user
# who has set one keeps it. (Kedro's plugin reads `.telemetry` too, DVC `.dvc/config`.)
for _name, _value in {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "KEDRO_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}.items():
    os.environ.setdefault(_name, _value)
del _name, _value


def __getattr__(name: str) -> Any:
    """The door for Python, opened when it is used: it brings torch along, which no command needs to start."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hwpq_pipeline import api

    return getattr(api, name)
