"""`kedro run` with errors for people: one line that says what is wrong, where, and what to do.

Kedro prints a traceback of its own machinery for a misspelt parameter. Here an error that the user can mend ends in one
line and exit status 1. Every other error keeps its traceback.
"""

from __future__ import annotations

from typing import Any

import click
from kedro.framework.cli.project import run as kedro_run

from hwpq_pipeline.commands import PlainError, hwpq
from hwpq_pipeline.messages import explain


@click.group(name="hwpq-pipeline")
def cli() -> None:
    """Commands of the project."""


@cli.command(name="run", params=kedro_run.params, help=kedro_run.help)
@click.pass_context
def run(context: click.Context, /, **options: Any) -> Any:
    """Kedro's `run` with its errors in one line each.

    Raises:
        PlainError: the user can mend what ended the run.
    """
    try:
        return context.forward(kedro_run, **options)
    except Exception as error:
        lines = explain(error, options.get("env"))
        if not lines:
            raise
        raise PlainError(lines) from None


cli.add_command(hwpq)
