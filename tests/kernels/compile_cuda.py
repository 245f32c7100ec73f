"""Build every CUDA kernel for real GPUs, without one: `python -m tests.kernels.compile_cuda` prints what each takes.

As JSON: for every kernel, options and compute capability the registers and the bytes of stack of a thread.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hwpq_pipeline.kernels.coordinate_descent import cuda as descent
from hwpq_pipeline.kernels.ewma_select import SEARCH_STEPS
from hwpq_pipeline.kernels.ewma_select import cuda as ewma
from hwpq_pipeline.kernels.ewma_select import triton_parts as ewma_parts
from hwpq_pipeline.kernels.fp8 import cuda as fp8
from hwpq_pipeline.kernels.group_scale import CANDIDATES, REFITS
from hwpq_pipeline.kernels.group_scale import cuda as scales
from hwpq_pipeline.kernels.triton_parts import STORED
from hwpq_pipeline.kernels.two_of_four import cuda as fours

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
EXACT = {"enable_fp_fusion": False}
#: As a launch would find them: pointers and these integers are multiples of 16.
MULTIPLES = {"stride", "columns", "width", "size", "block", "start"}


def build(kernel: Any, types: str, constants: dict[str, Any], capability: int, **options: Any) -> dict[str, int]:
    """Compile for a compute capability; `types` in the order of the arguments that are not constants."""
    names = kernel.arg_names
    given = iter(types.split())
    signature = {name: "constexpr" if name in constants else next(given) for name in names}
    hints = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or (kind == "i32" and name in MULTIPLES)
    }
    source = ASTSource(
        kernel, signature, constexprs={(names.index(name),): value for name, value in constants.items()}, attrs=hints
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {"registers": int(found.group(1)), "stack": int(found.group(2)), "shared": built.metadata.shared}


def every_kernel(capability: int) -> dict[str, dict[str, int]]:
    """Each kernel with the options that the pipeline runs it with."""
    found = {**averages(capability), **rounding(capability)}
    for dtype in ("bf16", "fp32"):
        found[f"two_of_four {dtype}"] = build(
            fours._select,
            f"*{dtype} i32 i32 i32 *fp32 *fp32 *fp32 *u8 i32 *i32",
            {"CROSS": False, "ROWS": fours.DEFAULT.rows, "BLOCK": fours.DEFAULT.columns},
            capability,
            num_warps=fours.DEFAULT.warps,
            **EXACT,
        )
        found[f"fp8 {dtype}"] = build(
            fp8._quantize,
            f"*{dtype} i32 i32 *u8 *fp32 fp32",
            {"BLOCK": fp8.BLOCK, "STORED": STORED[torch.bfloat16]},
            capability,
            num_warps=4,
            **EXACT,
        )
    return {f"{name} sm_{capability}": row for name, row in found.items()}


def averages(capability: int) -> dict[str, dict[str, int]]:
    """The moving average's."""
    found = {}
    gains: dict[str, Any] = {"ALPHA": 1 / 64, "BETA": 1 / 64}
    for dtype, rows in product(("bf16", "fp32"), (1024, 8192)):
        tile = ewma.default_tile(rows)
        shape = {"ROWS": tile.rows, "BLOCK": tile.columns, "STAGES": tile.stages}
        found[f"ewma {dtype} {rows} rows"] = build(
            ewma_parts.run_pass,
            f"*{dtype} i32 i32 i32 *fp32 *fp32 *fp32 *fp32 *fp32 i32 *u8 i32 *i64 *fp32",
            gains | shape | {"ratios": None, "RATIOS": False, "CROSS": False, "DOMAIN": 0},
            capability,
            num_warps=tile.warps,
            **EXACT,
        )
    found["ewma ratios"] = build(
        ewma_parts.run_pass,
        "*bf16 i32 i32 i32 *fp32 *fp32 *fp32 *fp32 *fp32 i32 i32 *fp32",
        gains | shape | {"keep": None, "kept": None, "state": None, "RATIOS": True, "CROSS": True, "DOMAIN": 2},
        capability,
        num_warps=tile.warps,
        **EXACT,
    )
    for size in (4096, 32768):
        found[f"ewma search {size}"] = build(
            ewma_parts.search_row,
            "*fp32 i32 *i64 *fp32",
            {"SIZE": size, "STEPS": SEARCH_STEPS},
            capability,
            num_warps=min(32, size // 1024),
        )
    return found


def rounding(capability: int) -> dict[str, dict[str, int]]:
    """Those that round to integers."""
    found = {}
    for size in (64, 128):
        found[f"coordinate_descent {size}"] = build(
            descent._sweep,
            "*i8 *fp32 *fp32 *u8 *fp32 *fp32 *fp32 i32 i32 i32 i32 i32 i32 fp32 fp32 fp32 fp32",
            {
                "MASKED": True,
                "REFIT": True,
                "COARSENING": True,
                "DROPPED": 16,
                "ROWS": descent.ROWS,
                "BLOCK": size,
            },
            capability,
            num_warps=descent.WARPS,
        )
        found[f"group_scale {size}"] = build(
            scales._search,
            "*fp32 *fp32 *fp32 *fp32 i32 i32 i32 fp32 fp32 fp32",
            {"STEPS": CANDIDATES, "REFIT": REFITS, "GROUPS": scales.TILE // size, "SIZE": size},
            capability,
            num_warps=4,
        )
    found["group_scale chosen"] = build(
        scales._choose,
        "*fp32 *fp32 *fp32 *fp32 i32 i32 i32 i32 fp32",
        {"GROUPS": scales.TILE // 16, "SIZE": 16},
        capability,
        num_warps=4,
    )
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps({**every_kernel(80), **every_kernel(90)}, indent=1) + "\n")
