from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated without being written holds NaN, or ones in every bit: an element left out shows."""
    real = torch.empty

    def empty(*arguments: Any, **options: Any) -> Tensor:
        tensor = real(*arguments, **options)
        if tensor.dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        return tensor.fill_(255 if tensor.dtype == torch.uint8 else -1)

    monkeypatch.setattr(torch, "empty", empty)
