"""`hwpq`, also `kedro hwpq`: the commands that Kedro lacks.

`hwpq variants` lists the variants and checks their entries. `hwpq compare` prints the table of the variants that have
been evaluated. `hwpq plan` says what a run would take.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import click

from hwpq_pipeline.errors import HwpqError

if TYPE_CHECKING:
    from rich.table import Table

    from hwpq_pipeline.method.recipe import Recipe
    from hwpq_pipeline.method.sections import Quantization, Selection
    from hwpq_pipeline.planning import Need

ENVIRONMENT = click.option("--env", default=None, help="Kedro environment, as in `kedro run --env`.")


class PlainError(click.ClickException):
    """An error for the user: printed as it is, exit status 1."""

    def __init__(self, lines: Iterable[str]) -> None:
        super().__init__("\n".join(lines))

    def show(self, file: IO[str] | None = None) -> None:
        """Print one `error:` line for each problem, on standard error."""
        for line in self.message.splitlines():
            click.secho(f"error: {line}", file=file, err=file is None, fg="red")


@click.group(name="hwpq")
def hwpq() -> None:
    """List and check variants, compare what was evaluated, plan a run."""


@hwpq.command()
@ENVIRONMENT
def variants(env: str | None) -> None:
    """List the configured variants; show each mistake in the configuration with its line."""
    from rich.markup import escape
    from rich.table import Table

    from hwpq_pipeline.inert import plain
    from hwpq_pipeline.method.recipe import Recipe
    from hwpq_pipeline.reporting.comparison import console

    table = Table(title="Variants")
    for head in ("variant", "weights kept", "recovery", "grid", "description"):
        table.add_column(head)
    for name, entry in checked_variants(env).items():
        recipe = Recipe.from_variant(entry)
        table.add_row(
            name,
            " / ".join(dict.fromkeys(_weights_kept(part.selection) for part in recipe.parts)),
            (recipe.recovery.preset if recipe.recovery else "none")
            + (", sequential" if recipe.sequence else "")
            + (", healed" if recipe.healing else ""),
            _grids(recipe),
            escape(plain(entry["description"])),
        )
    console().print(table)


def _weights_kept(selection: Selection | None) -> str:
    if selection is None:
        return "all"
    fraction = f", {selection.sparsity:.0%} dropped" if selection.sparsity else ""
    return f"{selection.structure} by {selection.metric}{fraction}"


def _grids(recipe: Recipe) -> str:
    words = " / ".join(dict.fromkeys(_grid(part.quantization) for part in recipe.parts))
    if recipe.budget is not None:
        words = f"{recipe.budget.kind} {recipe.budget.limit:.9g} of {words}"
    return f"{words}; embeddings {recipe.embeddings}" if recipe.embeddings else words


def _grid(quantization: Quantization | None) -> str:
    if quantization is None:
        return "none"
    return quantization.grid + (f", groups of {quantization.group_size}" if quantization.group_size else "")


@hwpq.command()
@ENVIRONMENT
def compare(env: str | None) -> None:
    """Print the table of the variants that have been evaluated."""
    from hwpq_pipeline.project import load_metrics, open_catalog, variant_names
    from hwpq_pipeline.reporting.comparison import comparison_table, console, show_table

    with plainly():
        catalog = open_catalog(env)
        names = variant_names()
        done = [name for name in names if catalog.exists(f"variants.{name}.metrics")]
        if not done:
            raise HwpqError("no variant has been evaluated", where="data/08_reporting", remedy="Run `kedro run` first")
        show_table(comparison_table({name: load_metrics(catalog, name) for name in done}))
        if missing := [name for name in names if name not in done]:
            console().print(f"Not evaluated yet: {', '.join(missing)}")


@hwpq.command()
@ENVIRONMENT
def plan(env: str | None) -> None:
    """Say what each stage would take here: memory, disk, bytes to read, seconds; and what does not fit."""
    from hwpq_pipeline.forecast import forecast, kept_sums
    from hwpq_pipeline.planning.limits import this_machine, tight, too_large
    from hwpq_pipeline.project import DATA, load_parameters, open_catalog, unfitting
    from hwpq_pipeline.reporting.comparison import console

    entries = checked_variants(env)
    with plainly():
        catalog, parameters = open_catalog(env), load_parameters(env)
        if not catalog.exists("model"):
            raise HwpqError(
                "no model to plan for", where="data/01_raw/model", remedy="Run `kedro run --pipelines fetch`"
            )
        model = catalog.load("model")
        if found := unfitting(model, entries):
            raise PlainError(map(str, found))
        needs = forecast(model, entries, parameters, timed=True)
    machine = this_machine(DATA)
    console().print(_plan_table(needs))
    console().print(
        f"This machine: {machine.memory / 1e9:.1f} GB of memory, {machine.free_memory / 1e9:.1f} GB free; "
        f"{machine.disk / 1e9:.1f} GB for data. The seconds come from samples that were timed now: beside other "
        "work they tell little. Downloads and imports do not count."
    )
    for line in (*tight(needs, machine), *(f"`kedro run` refuses: {error}" for error in too_large(needs, machine))):
        console().print(line, soft_wrap=True, markup=False)
    if (kept := kept_sums(model, parameters)) is not None:
        console().print(kept.told)


def _plan_table(needs: Sequence[Need]) -> Table:
    from rich.table import Table

    gpu = any(need.gpu for need in needs)
    table = Table(title="A run of all variants, planned")
    peaks = ["peak memory, GB", *(["peak GPU memory, GB"] if gpu else [])]
    for head in ("", *peaks, "disk, MB", "temporary files, MB", "read, MB", "seconds"):
        table.add_column(head, justify="right" if head else "left")
    variant: str | None = None
    for need in needs:
        if need.variant != variant:
            table.add_section()
            variant = need.variant
        parts = [need.memory / 1e9, *([need.gpu / 1e9] if gpu else [])]
        files = [need.disk, need.working, need.read]
        seconds = "" if need.seconds is None else f"{need.seconds:.0f}"
        table.add_row(need.name, *(f"{part:.2f}" for part in parts), *(f"{part / 1e6:.1f}" for part in files), seconds)
    table.add_section()
    disk, whole = sum(need.disk for need in needs), sum(need.seconds or 0 for need in needs)
    table.add_row("total", "", *([""] if gpu else []), f"{disk / 1e6:.1f}", "", "", f"{whole:.0f}")
    return table


def checked_variants(env: str | None) -> dict[str, dict[str, Any]]:
    """The configured variants, checked and with their defaults.

    Raises:
        PlainError: the configuration is wrong; it has one line for each mistake.
    """
    from hwpq_pipeline.configuration import mistakes
    from hwpq_pipeline.project import load_parameters, variant_names
    from hwpq_pipeline.variant import Variant

    with plainly():
        parameters = load_parameters(env)
        names = variant_names(parameters.get("variants") or {})
        found = mistakes(parameters, env)
    if found:
        raise PlainError(map(str, found))
    return {name: Variant.model_validate(parameters["variants"][name]).model_dump() for name in names}


@contextmanager
def plainly() -> Iterator[None]:
    """End the command in one line on an `HwpqError`.

    Raises:
        PlainError: in the place of the `HwpqError`.
    """
    try:
        yield
    except HwpqError as error:
        raise PlainError([str(error)]) from None


def main() -> None:
    """The `hwpq` command, to be run in the project's root.

    Raises:
        SystemExit: with status 1, where there is no project.
    """
    from hwpq_pipeline.project import bootstrap

    try:
        bootstrap()
    except HwpqError as error:
        click.secho(f"error: {error}", err=True, fg="red")
        raise SystemExit(1) from None
    hwpq()
