"""The layers of the selection bench, the rivals that sort, and what is wrong with a rival's mask."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

#: Shapes of LLaMA-2's linears (7B, 13B, 70B), and of the default model's, which fit the caches.
LARGE = ("4096x4096", "11008x4096", "4096x11008", "5120x13824", "8192x28672")
SMALL = ("576x576", "1536x576", "576x1536")
QUICK = ("4096x4096", *SMALL)
#: All linears of the default model, by the name of their row.
MODEL = {"SmolLM2-135M": 30 * (*2 * ("576x576",), *2 * ("192x576",), *2 * ("1536x576",), "576x1536")}
SPARSITY, CHECKED_ROWS = 0.5, 24


@dataclass
class Case:
    """A weight, its inputs' energies, and where a copy goes."""

    weight: Tensor
    energy: Tensor
    target: Tensor = field(init=False)
    rows: Tensor = field(init=False)  # that are checked

    def __post_init__(self) -> None:
        self.target = torch.zeros_like(self.weight)
        self.rows = torch.linspace(0, self.weight.shape[0] - 1, min(CHECKED_ROWS, self.weight.shape[0])).long()

    @property
    def kept(self) -> int:
        """Weights that a row keeps."""
        return self.weight.shape[1] - round(SPARSITY * self.weight.shape[1])

    def scores(self) -> Tensor:
        """Wanda's: |w| · ‖x‖, float32."""
        return self.weight.abs() * self.energy.sqrt().reshape(1, -1)


def make(shape: str, dtype: torch.dtype) -> list[Case]:
    """The layers of a row of the table."""
    return [make_layer(layer, dtype) for layer in MODEL.get(shape, (shape,))]


def make_layer(shape: str, dtype: torch.dtype) -> Case:
    """Weights from a normal distribution, energies over three decades: speed does not depend on them."""
    rows, columns = (int(size) for size in shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(rows, columns, dtype=dtype)
    for part in weight.split(1024):
        part.copy_(torch.randn(part.shape, generator=generator) * 0.02)
    return Case(weight, 10 ** (3 * torch.rand(columns, generator=generator)))


def sort(case: Case) -> Tensor:
    """A full sort of every row's scores, threshold at the wanted rank."""
    scores = case.scores()
    ordered = torch.sort(scores, dim=1).values
    return scores >= ordered[:, -case.kept, None]


def topk(case: Case) -> Tensor:
    """The best of every row, by their indices."""
    scores = case.scores()
    best = torch.topk(scores, case.kept, dim=1, sorted=False).indices
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, best, True)


def kthvalue(case: Case) -> Tensor:
    """Threshold at the wanted rank, by selection."""
    scores = case.scores()
    return scores > torch.kthvalue(scores, scores.shape[1] - case.kept, dim=1, keepdim=True).values


def wanda(case: Case) -> Tensor:
    """`prune_wanda` of locuslab/wanda, unstructured; there the mask marks what is dropped."""
    metric = torch.abs(case.weight) * torch.sqrt(case.energy.reshape((1, -1)))
    mask = torch.zeros_like(metric) == 1
    ordered = torch.sort(metric, dim=-1, stable=True)
    mask.scatter_(1, ordered[1][:, : int(metric.shape[1] * SPARSITY)], True)
    return mask


def topk_groups(case: Case) -> Tensor:
    """2:4 by `torch.topk` on groups of four."""
    groups = case.scores().unflatten(1, (-1, 4))
    best = torch.topk(groups, 2, dim=2, sorted=False).indices
    return torch.zeros(groups.shape, dtype=torch.bool).scatter_(2, best, True).flatten(1)


def check_rival(name: str, case: Case, mask: Tensor) -> str:
    """Right number, and no kept score below a dropped one; ties may go either way, and `sort` keeps them all."""
    scores, keep = case.scores()[case.rows], ~mask if name == "wanda" else mask
    if name == "topk_groups":
        scores, keep = (part.unflatten(1, (-1, 4)) for part in (scores, keep))
    wanted = 2 if name == "topk_groups" else case.kept
    lowest = scores.masked_fill(~keep, float("inf")).amin(-1)
    highest = scores.masked_fill(keep, -1).amax(-1)
    if not bool((lowest >= highest).all()):
        return "a dropped score is above a kept one"
    surplus = (keep.sum(-1) - wanted).abs().float()
    return "" if bool((surplus <= 0.01 * scores.shape[-1]).all()) else "the wrong number is kept"
