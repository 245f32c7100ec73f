"""`python -m hwpq_pipeline` and the `hwpq-pipeline` command: `kedro run` by another name, same options.

Like `kedro run` it wants a folder with `conf/` in it, so start it in the project's root.
"""

from __future__ import annotations

import sys
from typing import Any

from kedro.framework.cli.utils import find_run_command
from kedro.framework.project import configure_project


def main(*args: Any, **kwargs: Any) -> Any:
    """Run the pipelines; arguments are those of Kedro's `run` command, by default the process's own."""
    package_name = "hwpq_pipeline"
    configure_project(package_name)
    kwargs.setdefault("standalone_mode", not hasattr(sys, "ps1"))  # a REPL must outlive the command
    return find_run_command(package_name)(*args, **kwargs)


if __name__ == "__main__":
    main()
