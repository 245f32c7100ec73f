"""Where a computation runs: choosing a device, and finding out whether its kernels can be had.

CUDA kernels are written in Triton, which CUDA builds of torch bring along. Nothing here imports it: a machine without
a GPU needs none.
"""

from __future__ import annotations

import importlib.util
import logging

import torch
from torch import Tensor

from hwpq_pipeline.errors import HwpqError

DEVICES = ("auto", "cpu", "cuda")

__all__ = ["DEVICES", "choose_device", "wants_cuda"]


def choose_device(name: str, *, tf32: bool = False, where: str = "device") -> torch.device:
    """The device of that name, told in the log; `auto` is CUDA where torch sees a GPU and Triton is there.

    Args:
        name: one of `DEVICES`.
        tf32: let float32 matrix products on the GPU round their factors to TF32. Of the process, not of the device.
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
        raise HwpqError(
            f"there is no kernel for the device '{tensor.device}'",
            where=where,
            remedy="Move the tensor to the CPU or to a CUDA device",
        )
    if kind == "cuda" and not has_triton():
        raise _no_triton(where)
    return kind == "cuda"


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _no_triton(where: str) -> HwpqError:
    return HwpqError(
        "the CUDA kernels need Triton, which is not installed",
        where=where,
        remedy="Install the extra `cuda` (triton), or set device to cpu",
    )
