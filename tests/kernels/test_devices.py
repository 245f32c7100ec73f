"""Choosing where to compute; and what is imported for it."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels import devices
from hwpq_pipeline.kernels.devices import choose_device, on_the_cpu

Machine = Callable[[bool, bool], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Make a machine with or without GPU and Triton."""

    def make(gpu: bool, triton: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        monkeypatch.setattr(devices, "has_triton", lambda: triton)

    before = torch.backends.cuda.matmul.allow_tf32
    yield make
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    ("name", "gpu", "triton", "expected"),
    [
        ("auto", True, True, "cuda:1"),
        ("cuda", True, True, "cuda:1"),
        ("cpu", True, True, "cpu"),
        ("auto", False, True, "cpu"),
        ("auto", True, False, "cpu"),
    ],
)
def test_choice_is_made_and_told(
    machine: Machine, caplog: pytest.LogCaptureFixture, name: str, gpu: bool, triton: bool, expected: str
) -> None:
    machine(gpu, triton)
    with caplog.at_level(logging.INFO, logger="hwpq_pipeline"):
        assert str(choose_device(name, where="select")) == expected
    assert f"device: {name}" in caplog.text
    assert ("a GPU (" in caplog.text) == (expected != "cpu")
    assert ("Triton is not" in caplog.text) == (gpu and not triton)


def test_what_cannot_be_had_is_named(machine: Machine) -> None:
    machine(False, True)
    with pytest.raises(HwpqError, match="torch sees no CUDA device"):
        choose_device("cuda")
    machine(True, False)
    with pytest.raises(HwpqError, match=r"need Triton.*the extra `cuda`"):
        choose_device("cuda")
    with pytest.raises(HwpqError, match="unknown device 'tpu'"):
        choose_device("tpu")


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_as_asked_for(machine: Machine, tf32: bool) -> None:
    machine(True, True)
    choose_device("auto", tf32=tf32)
    assert torch.backends.cuda.matmul.allow_tf32 is tf32


PROBE = """
import importlib, pkgutil, sys
for name in ("kedro", "mlflow", "pandera", "pandas", "pydantic", "numba", "llvmlite"):
    sys.modules[name] = None          # importing it raises
import hwpq_pipeline.compression, hwpq_pipeline.kernels
seen = []
for package in (hwpq_pipeline.compression, hwpq_pipeline.kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        # CPU kernels are numba's; CUDA kernels need Triton
        last = module.name.rpartition(".")[2]
        if last in {cpu} or (last in ("cuda", "triton_parts") and not {triton}):
            continue
        importlib.import_module(module.name)
        seen.append(module.name)
if {triton}:
    for name in ("gpu.__main__", "gpu.ceilings", "gpu.selecting", "gpu.recovering", "gpu.inference", "output"):
        importlib.import_module("benchmarks." + name)
print(len(seen))
"""


def test_a_machine_with_a_gpu_needs_neither_numba_nor_frameworks(root: Path) -> None:
    cpu = ("cpu", "lanes", "contracted", "e2m1", "recurrence", "search")
    probe = PROBE.format(cpu=cpu, triton=devices.has_triton())
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'src')!r}]\n{probe}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


GPU = torch.device("cuda", 0)


def on_a_gpu(value: torch.Tensor) -> Any:
    """Stands in for a CUDA tensor where there is no GPU."""
    return SimpleNamespace(device=GPU, cpu=lambda: value)


class Result:
    def __init__(self, value: torch.Tensor, device: torch.device) -> None:
        self.value, self.device = value, device

    def to(self, device: torch.device) -> Result:
        return Result(self.value, device)


def test_without_a_cuda_kernel_the_cpu_works_and_the_result_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    devices._tell.cache_clear()
    seen = []

    def work(first: torch.Tensor, second: torch.Tensor) -> Result:
        seen.append((first.device.type, second.device.type))
        return Result(first + second, first.device)

    one, two = torch.ones(3), torch.full((3,), 2.0)
    with caplog.at_level(logging.INFO, logger="hwpq_pipeline"):
        for _ in range(2):
            found = on_the_cpu(work, on_a_gpu(one), on_a_gpu(two), where="some_kernel")
    assert seen == [("cpu", "cpu")] * 2
    assert found.device == GPU
    assert found.value.tolist() == [3.0, 3.0, 3.0]
    assert caplog.text.count("some_kernel: there is no CUDA kernel yet") == 1
    assert on_the_cpu(work, one, two, where="some_kernel").device.type == "cpu"
