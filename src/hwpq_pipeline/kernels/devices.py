"""Where a computation runs: choosing a device, and finding out whether it has kernels.

CUDA kernels are written in Triton, which CUDA builds of torch bring along. Nothing here imports it: a machine without
a GPU needs none. An operation that has no CUDA kernel yet is run by `on_the_cpu`.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from hwpq_pipeline.errors import HwpqError

DEVICES = ("auto", "cpu", "cuda")

__all__ = ["DEVICES", "choose_device", "on_the_cpu", "refuse_cuda", "to_the_cpu", "wants_cuda"]


class Movable(Protocol):
    """A tensor, or a result that holds some."""

    def to(self, device: torch.device, /) -> Self:
        """The same on a device."""


Result = TypeVar("Result", bound=Movable)


def choose_device(name: str, *, tf32: bool = False, where: str = "device") -> torch.device:
    """The device with that name, told in the log; `auto` is CUDA where torch sees a GPU and Triton is there.

    Args:
        name: one of `DEVICES`.
        tf32: let float32 matrix products on the GPU round their factors to TF32. It holds for the whole process.
        where: what asks, for errors and the log.

    Raises:
        HwpqError: an unknown name, or `cuda` where torch sees no GPU or Triton is missing.
    """
    if name not in DEVICES:
        raise HwpqError(f"unknown device '{name}'", where=where, remedy=f"Choose one of {', '.join(DEVICES)}")
    seen, triton = torch.cuda.is_available(), has_triton()
    if name == "cuda" and not seen:
        raise HwpqError(
            "torch sees no CUDA device",
            where=where,
            remedy="Set device to auto or cpu, or install a CUDA build of torch on a machine with a GPU",
        )
    if name == "cuda" and not triton:
        raise _no_triton(where)
    log = logging.getLogger(__name__)
    if name == "auto" and seen and not triton:
        log.warning("%s: a GPU is there but Triton is not, so the CPU is used; the extra `cuda` has it", where)
    if name == "cpu" or not (seen and triton):
        log.info("%s: on the CPU (device: %s)", where, name)
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cuda.matmul.allow_tf32 = tf32
    products = "TF32" if tf32 else "float32"
    log.info("%s: on %s, %s (device: %s; %s products)", where, device, torch.cuda.get_device_name(), name, products)
    return device


def wants_cuda(tensor: Tensor, where: str) -> bool:
    """Whether an operation on this tensor is for the CUDA kernel (else for the CPU's).

    Raises:
        HwpqError: the tensor is on a device without a kernel, or Triton is missing.
    """
    kind = tensor.device.type
    if kind not in ("cpu", "cuda"):
        raise _no_kernel(tensor.device, where)
    if kind == "cuda" and not has_triton():
        raise _no_triton(where)
    return kind == "cuda"


def on_the_cpu(work: Callable[..., Result], *tensors: Tensor, where: str) -> Result:
    """`work(*tensors)` of an operation that has kernels for the CPU alone; the result comes back.

    Args:
        work: the operation.
        tensors: on one device.
        where: the operation's name, for errors and the log.

    Raises:
        HwpqError: the tensors are on a device without a kernel.
    """
    return work(*to_the_cpu(*tensors, where=where)).to(tensors[0].device)


def to_the_cpu(*tensors: Tensor, where: str) -> list[Tensor]:
    """The tensors of an operation that has kernels for the CPU alone, where those can read them.

    Tensors on a GPU are copied, and the log says so once.

    Raises:
        HwpqError: the tensors are on a device without a kernel.
    """
    device = tensors[0].device
    if device.type not in ("cpu", "cuda"):
        raise _no_kernel(device, where)
    if device.type == "cuda":
        _tell(where)
    return [tensor.cpu() for tensor in tensors]


@functools.cache
def _tell(where: str) -> None:
    """Once a process for each operation."""
    log = logging.getLogger(__name__)
    log.info("%s: there is no CUDA kernel yet; tensors on a GPU are copied to the CPU", where)


def refuse_cuda(tensor: Tensor, where: str) -> None:
    """Raise `HwpqError` for a tensor that an operation without a CUDA kernel cannot read."""
    if tensor.device.type != "cpu":
        raise _no_kernel(tensor.device, where)


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _no_kernel(device: torch.device, where: str) -> HwpqError:
    return HwpqError(
        f"there is no kernel for the device '{device}'",
        where=where,
        remedy="Move the tensor to the CPU or to a CUDA device",
    )


def _no_triton(where: str) -> HwpqError:
    return HwpqError(
        "the CUDA kernels need Triton, which is not installed",
        where=where,
        remedy="Install the extra `cuda` (triton), or set device to cpu",
    )
