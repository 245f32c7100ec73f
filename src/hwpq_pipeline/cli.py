"""`kedro run` with errors for people: one line that says what is wrong, where, and what to do.

Kedro prints a traceback of its own machinery for a misspelt parameter. Here an error that the user can mend ends in one
line and exit status 1. Every other error keeps its traceback.
"""

from __future__ import annotations

import re
from typing import Any

import click
from kedro.framework.cli.project import run as kedro_run
from kedro.validation.exceptions import DataValidationError, ParameterValidationError

from hwpq_pipeline.commands import PlainError, hwpq, located
from hwpq_pipeline.errors import HwpqError


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


def explain(error: BaseException, env: str | None = None) -> list[str]:
    """Lines that tell the user what to mend; none for an error that the user cannot mend.

    Args:
        error: the error that ended the run.
        env: the run's Kedro environment.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, HwpqError):
            return [str(link)]
        if isinstance(link, ExceptionGroup) and all(isinstance(part, HwpqError) for part in link.exceptions):
            return [str(part) for part in link.exceptions]
        if isinstance(link, ParameterValidationError):
            return _parameter_lines(str(link), env)
        if isinstance(link, DataValidationError):
            return [" ".join(str(link).split())]
        if isinstance(link, ValueError) and (found := re.search(r"following namespaces: (.+)$", str(link))):
            return [f"{found[1]}: no such variant. Use one of {', '.join(_known_variants())}, as variants.<name>"]
        if isinstance(link, ValueError) and str(link).startswith("Failed to find the pipeline"):
            return [" ".join(str(link).split())]
    return []


def _known_variants() -> list[str]:
    from hwpq_pipeline.project import variant_names

    return variant_names()


def _parameter_lines(message: str, env: str | None) -> list[str]:
    """Pydantic's report, a line a mistake: `conf/base/parameters_variants.yml:9: variants.fp8.quantization.grid: …`."""
    lines: list[str] = []
    for part in re.split(r"\n- (?=Parameter ')", message)[1:]:
        name = re.match(r"Parameter '([^']+)'", part)
        where = name[1] if name else "parameters"
        details = re.findall(r"\n([\w.-]+)?\n?  (.+?)(?: \[type=.*)?(?=\n|$)", part)
        problems = [(field, text) for field, text in details if not text.lstrip().startswith("For further")]
        if not problems:
            lines.append(" ".join(part.split()))
        for field, text in problems:
            path = ".".join(filter(None, (where.removeprefix("params:"), field)))
            lines.append(located(tuple(path.split(".")), text, env))
    return list(dict.fromkeys(lines))
