"""What the ops of packed weights and INT8 tables refuse: they would read beyond their tensors, or answer wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hwpq_pipeline.compression.packing import pack_two_of_four
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels.int8_linear import int8_linear
from hwpq_pipeline.kernels.packed_linear import KINDS, Kernel, Packed, arrange, packed_linear, packed_linear_op
from tests.kernels.packed import codes, needs_compiler, two_of_four

ROWS, COLUMNS = 40, 64
KIND = KINDS.index("int8")
#: What replaces an argument of a right call.
WRONG: dict[str, dict[str, Any]] = {
    "values of another kind": {"kind": KINDS.index("int4")},
    "a kind that is none": {"kind": 6},
    "a negative kind": {"kind": -1},
    "values cut": {"values": lambda right: right[:, :, :-1].contiguous()},
    "values in one dimension": {"values": lambda right: right.flatten()},
    "values of another dtype": {"values": lambda right: right.view(torch.int8)},
    "places of fewer blocks": {"places": lambda right: right[:-1].contiguous()},
    "places of fewer words": {"places": lambda right: right[:, :-1].contiguous()},
    "places of another dtype": {"places": lambda right: right.long()},
    "scales of fewer blocks": {"scale": lambda right: right[:-1].contiguous()},
    "no scales": {"scale": lambda right: right[:, :0].contiguous()},
    "more groups of scales than words": {"scale": lambda right: right.repeat(1, 3, 1)},
    "scales of another dtype": {"scale": lambda right: right.double()},
    "too many rows": {"rows": ROWS + 1},
    "too few rows": {"rows": ROWS - 8},
    "inputs of another width": {"x": torch.ones(1, COLUMNS + 32)},
    "inputs without a dimension": {"x": torch.ones(())},
    "inputs of integers": {"x": torch.ones(1, COLUMNS, dtype=torch.long)},
    "complex inputs": {"x": torch.ones(1, COLUMNS, dtype=torch.complex64)},
    "inputs of 8 bits": {"x": torch.ones(1, COLUMNS).to(torch.float8_e4m3fn)},
    "a bias of one number": {"bias": torch.ones(1)},
    "a bias that is too short": {"bias": torch.ones(ROWS - 1)},
    "a bias that is too long": {"bias": torch.ones(ROWS + 1)},
    "a bias of two dimensions": {"bias": torch.ones(1, ROWS)},
    "a bias of integers": {"bias": torch.ones(ROWS, dtype=torch.long)},
    "gradients of the inputs": {"x": torch.ones(1, COLUMNS, requires_grad=True)},
}


@pytest.fixture(params=["numba", pytest.param("native", marks=needs_compiler)])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """Each of the kernels in turn."""
    found: Kernel = request.param
    return found


@pytest.fixture
def weight() -> Packed:
    """One of integers."""
    generator = torch.Generator().manual_seed(0)
    kept, positions = pack_two_of_four(codes("int8", two_of_four(ROWS, COLUMNS, generator)))
    return arrange(kept, positions, torch.ones(ROWS, 1))


def right(weight: Packed) -> dict[str, Any]:
    """The arguments of a call that is right."""
    return {"x": torch.ones(1, COLUMNS), "values": weight.values, "places": weight.places, "scale": weight.scale,
            "bias": torch.ones(ROWS), "kind": KIND, "rows": ROWS}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_an_op_reads_nothing_that_does_not_belong_together(kernel: Kernel, weight: Packed, what: str) -> None:
    op, arguments = packed_linear_op(kernel), right(weight)
    assert op(*arguments.values()).shape == (1, ROWS)
    ((name, wrong),) = WRONG[what].items()
    arguments[name] = wrong(arguments[name]) if callable(wrong) and not isinstance(wrong, Tensor) else wrong
    with pytest.raises((ValueError, RuntimeError, HwpqError)):
        op(*arguments.values())


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.ones(()), "a single number instead of 64 inputs"),
        (torch.ones(1, COLUMNS, dtype=torch.long), "inputs of torch.int64"),
        (torch.ones(1, COLUMNS, dtype=torch.bool), "inputs of torch.bool"),
        (torch.ones(1, COLUMNS, dtype=torch.complex64), "inputs of torch.complex64"),
        (torch.ones(1, COLUMNS).to(torch.float8_e4m3fn), "inputs of torch.float8_e4m3fn"),
        (torch.ones(1, COLUMNS, requires_grad=True), "an input wants gradients, and this is for inference only"),
    ],
)
def test_wrong_inputs_end_in_one_line(kernel: Kernel, weight: Packed, x: Tensor, said: str) -> None:
    table = torch.ones(ROWS, COLUMNS, dtype=torch.int8)
    ways: list[Callable[[], Tensor]] = [
        lambda: packed_linear(weight, x, kernel=kernel),
        lambda: int8_linear(x, table, torch.ones(ROWS, dtype=torch.bfloat16)),
    ]
    for way in ways:
        with pytest.raises(HwpqError, match=said):
            way()


def test_gradients_that_nobody_wants_are_no_error(kernel: Kernel, weight: Packed) -> None:
    x = torch.ones(1, COLUMNS, requires_grad=True)
    with torch.no_grad():
        found = packed_linear(weight, x, kernel=kernel)
    assert not found.requires_grad
    assert torch.equal(packed_linear(weight, x.detach(), kernel=kernel), found)


def test_compiled_code_refuses_gradients_too(kernel: Kernel, weight: Packed) -> None:
    traced = torch.compile(lambda x: packed_linear(weight, x, kernel=kernel) * 2, backend="aot_eager")
    assert traced(torch.ones(1, COLUMNS)).shape == (1, ROWS)
    with pytest.raises(HwpqError, match="for inference only"):
        traced(torch.ones(1, COLUMNS, requires_grad=True))


def test_an_unknown_kernel_is_named(weight: Packed) -> None:
    unknown: Any = "cuda"
    with pytest.raises(HwpqError, match=r"no kernel 'cuda'\. Choose one of numba, native"):
        packed_linear(weight, torch.ones(1, COLUMNS), kernel=unknown)


def test_a_weight_whose_tensors_do_not_belong_together_is_none(weight: Packed) -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        Packed(weight.values[:, :1], weight.places, weight.scale, weight.kind, weight.shape)
    with pytest.raises(ValueError, match="96 inputs for 2 words"):
        Packed(weight.values, weight.places, weight.scale, weight.kind, (ROWS, 96))
