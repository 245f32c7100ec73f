"""`hwpq`, also `kedro hwpq`: the commands that Kedro lacks.

`hwpq variants` lists the variants and checks their entries. `hwpq compare` prints the table of the variants that have
been evaluated. `hwpq plan` estimates what a run would cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import click

from hwpq_pipeline.errors import HwpqError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

    from hwpq_pipeline.calibration.keep import Kept
    from hwpq_pipeline.checkpoints.layers import Layer
    from hwpq_pipeline.method.recipe import Recipe
    from hwpq_pipeline.method.sections import Quantization, Selection
    from hwpq_pipeline.planning import Row

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
    """Estimate what a run would cost: bytes on disk, memory, and seconds on this machine."""
    from hwpq_pipeline.method.recipe import Recipe
    from hwpq_pipeline.planning import plan_rows
    from hwpq_pipeline.planning.costs import operations_a_second
    from hwpq_pipeline.planning.shapes import read_shapes
    from hwpq_pipeline.project import load_parameters, open_catalog, unfitting
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
        shapes = read_shapes(model)
        kept = _kept(parameters["calibration"], shapes.layers, model)
    calibration, evaluation = (
        parameters[part]["samples"] * parameters[part]["length"] for part in ("calibration", "evaluation")
    )
    rows = plan_rows(
        shapes,
        {name: Recipe.from_variant(entry) for name, entry in entries.items()},
        calibration_tokens=calibration,
        evaluation_tokens=evaluation,
        speed=operations_a_second(),
        sums_kept=kept is None or kept.sums,
    )
    console().print(_plan_table(rows))
    tables = sum(rows * columns for rows, columns in shapes.tables)
    console().print(
        f"Memory: {4e-9 * tables:.1f} GB for embedding and head, {4e-9 * shapes.block:.1f} GB for one decoder block, "
        "and 1 to 3 GB for Python, activations and one layer's work. A variant with a budget, or one that is healed, "
        f"takes {4e-9 * shapes.parameters:.1f} GB more for the whole model. "
        "The seconds come from a product timed here: they tell minutes from hours."
    )
    if kept is not None:
        console().print(kept.told)


def _kept(calibration: dict[str, Any], layers: Iterable[Layer], folder: Path) -> Kept | None:
    """What `calibrate` would keep of the Gram matrices; None if it makes none."""
    from hwpq_pipeline.calibration.keep import decide
    from hwpq_pipeline.parameters import Calibration

    chosen = Calibration.model_validate(calibration)
    return decide(chosen.keep, layers, folder) if chosen.mode == "gram" else None


def _plan_table(rows: Sequence[Row]) -> Table:
    from rich.table import Table

    from hwpq_pipeline.figures import SIZE

    table = Table(title="A run of all variants, estimated")
    for head in ("", SIZE.label, "MB of all files in data/", "seconds"):
        table.add_column(head, justify="right" if head else "left")
    for row in rows:
        export = SIZE.show(row.export_bytes) if row.export_bytes else ""
        table.add_row(row.name, export, f"{row.disk_bytes / 1e6:.1f}", f"{row.seconds:.0f}")
    table.add_section()
    disk, seconds = sum(row.disk_bytes for row in rows), sum(row.seconds for row in rows)
    table.add_row("total", "", f"{disk / 1e6:.1f}", f"{seconds:.0f}")
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
