"""What may stand in `conf/*/quality_gates.yml`, made from the table of figures.

It is not in `parameters`: the stage `recipes` depends on that module, and a figure's label concerns no recipe.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, create_model

from hwpq_pipeline.figures import GATED, Figure
from hwpq_pipeline.parameters import Parameters


def _limit(figure: Figure) -> Any:
    """The type of a figure's limit, and its default: no limit."""
    lowest = Field(gt=0) if figure.positive else Field(ge=0)
    return Annotated[int if figure.whole else float, lowest, Field(le=figure.most)] | None, None


#: Limits on one variant's figures. None is no limit.
Gate = create_model("Gate", __base__=Parameters, **{figure.limit: _limit(figure) for figure in GATED})


class QualityGates(Parameters):
    """Limits by variant (pipeline `gate`)."""

    variants: dict[str, Gate]  # type: ignore[valid-type]  # a type that is made when the module is read

    def limits(self) -> dict[str, dict[str, float | None]]:
        """Plain values, by variant and by the limit's name."""
        plain: dict[str, dict[str, float | None]] = self.model_dump()["variants"]
        return plain
