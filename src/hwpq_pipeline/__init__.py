"""Compress a causal language model into variants that load in stock engines, and compare what each costs.

The rooms and the one direction of their imports are told in `docs/architecture.md`; the method in
`hwpq_pipeline.compression`; what runs, and with which numbers, in `conf/base`.
"""

from __future__ import annotations

import os

__version__ = "0.1.0"

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
