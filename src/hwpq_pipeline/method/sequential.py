"""Working through a model in the order of its layers, each on what the compressed layers before it give.

Every block runs twice. Run as it came on the dense model's hidden states, it tells what every layer should give. Run on
the hidden states of the compressed model, it stops before each group of layers: its inputs are summed there
(`X̃X̃ᵀ` and `(T − W₀X̃)X̃ᵀ`), the dense weight is replaced by the corrected target (`compression.correction`), the steps of
the variant are taken, and the run goes on with what they made. So a variant costs two forward passes and the sums.

**The residual stream.** A layer whose output is added to the stream is also asked for what the stream has lost by then.
Which layers do that is measured, not assumed from names: the change of the stream over the dense block is fitted by the
outputs of the layers that are as wide as it. Where it is their weighted sum, the layers with a weight are the writers;
where it is not (a norm follows the layer, say), there are none and the layers are asked for the dense outputs alone.

**Memory.** All tokens run through a block at once, so that its layers can be compressed on the way and each runs only
twice: two hidden states and the activations of two runs of one block, float32. For a model or a sample that is too
large for this, take fewer samples.

**Precision.** Weights, hidden states and sums are float32. Products are of the dtype that the statistics were collected
in: bfloat16, where the processor multiplies it, makes the walk twice as fast. Its rounding (2⁻⁹ of a value) is taken
for what an output lacks, too, but has no part in common with the inputs, and goes as the tokens are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from hwpq_pipeline.checkpoints.layers import Layer, find_blocks
from hwpq_pipeline.compression.correction import corrected_target
from hwpq_pipeline.decoder.blocks import first_output, record_inputs
from hwpq_pipeline.decoder.gram import Gram
from hwpq_pipeline.decoder.loading import checked_ids, load_dense
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method.groups import Group, Groups
from hwpq_pipeline.progress import with_progress

#: Tokens on which the writers of the residual stream are found, and how exactly their sum must be its change.
PROBE, FIT = 512, 1e-3
#: Tokens of a product in bfloat16, which is rounded before it is added up.
BATCH = 4096


class SequentialGroups(Groups):
    """The groups of a model, each on the outputs of the compressed ones before it.

    Args:
        groups: of the dense model; of their statistics only which layers share an input is used.
        token_ids: (samples, length) the tokens to run.
        damping: of the correction, in units of the mean energy.
        dtype: of products over tokens, float32 or bfloat16.
    """

    def __init__(
        self,
        groups: Groups,
        token_ids: np.ndarray[Any, Any] | Tensor,
        *,
        damping: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(groups.checkpoint, groups.layers, groups.statistics, groups.steps, groups.device)
        self.token_ids, self.damping, self.dtype = token_ids, damping, dtype

    def products(self, *, low: bool) -> torch.autocast:
        """A context in which matrix products are of this object's dtype, or float32 if not ``low``.

        Nothing cast is kept: a weight is used before it is compressed, and after.
        """
        enabled = low and self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def run(self, description: str) -> Iterator[Group]:
        """Take all steps on one group after the other, behind a progress bar.

        A group's `original` is the corrected target, and its errors are relative to that.

        Raises:
            HwpqError: a weight is damaged, a step cannot be taken, or the model routes tokens by their values.
        """
        yield from with_progress(self._walk(), description, len(self.members()))

    @torch.inference_mode()
    def _walk(self) -> Iterator[Group]:
        model = load_dense(self.checkpoint.path, torch.float32, self.device)
        ids = checked_ids(self.token_ids, model, str(self.checkpoint.path)).to(self.device)
        _, blocks = find_blocks(model)
        (dense,), (extra,) = record_inputs(model, blocks, [ids])
        compressed = dense
        for number, block in enumerate(blocks):
            forward = partial(self._forward, block, extra[number])
            members = [self._module(block, layer) for layer in self.layers.in_block(number)]
            record = _Dense(members)
            following = record.run(forward, dense)
            run = _Compressed(self, members, record, record.stream_weights(dense, following), dense - compressed)
            dense, compressed = following, run.run(forward, compressed)
            yield from run.groups.values()
            block.to("meta")  # it has done its work

    def _forward(self, block: nn.Module, extra: tuple[tuple[Any, ...], dict[str, Any]], state: Tensor) -> Tensor:
        positional, keyword = extra
        with self.products(low=True):
            return first_output(block(state, *positional, **keyword))

    def _module(self, block: nn.Module, layer: Layer) -> tuple[Layer, nn.Linear]:
        module = block.get_submodule(layer.name.removeprefix(f"{self.layers.blocks_name}.{layer.block}."))
        return layer, cast(nn.Linear, module)


@dataclass(frozen=True)
class LiveStatistics:
    """The sums of one group's inputs as they are (an `InputStatistics`)."""

    name: str
    sums: Tensor
    mode: str = "gram"

    def group_of(self, layer: str) -> str:  # noqa: ARG002
        """The group, whichever layer it is."""
        return self.name

    def gram(self, group: str) -> Tensor:  # noqa: ARG002
        """Σ x̃ x̃ᵀ, shape (in_features, in_features), float32."""
        return self.sums

    def energy(self, group: str) -> Tensor:  # noqa: ARG002
        """Its diagonal."""
        return self.sums.diagonal().clone()


class _Dense:
    """What the layers of one block get and give in the dense model: all inputs, and outputs as wide as the stream."""

    def __init__(self, members: list[tuple[Layer, nn.Linear]]) -> None:
        self.members = members
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def run(self, forward: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
        """The block's hidden states (samples, length, hidden); what its layers get and give is kept."""
        with ExitStack() as stack:
            for layer, module in self.members:
                stack.callback(module.register_forward_hook(partial(self._keep, layer.name, state.shape)).remove)
            return forward(state)

    def _keep(self, name: str, stream: torch.Size, _: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        self.inputs[name] = arguments[0]
        if output.shape == stream:
            self.outputs[name] = output

    def stream_weights(self, before: Tensor, after: Tensor) -> dict[str, float]:
        """Layers whose outputs make up the change of the residual stream, and each one's weight in it."""
        if not self.outputs:
            return {}
        change = _probe(after - before)
        columns = torch.stack([_probe(output) for output in self.outputs.values()], dim=1)
        weights = torch.linalg.lstsq(columns, change[:, None]).solution[:, 0]
        missed = float((change - columns @ weights).norm() / change.norm().clamp_min(torch.finfo(torch.float64).tiny))
        if missed > FIT:
            return {}
        return {name: float(weight) for name, weight in zip(self.outputs, weights, strict=True) if abs(weight) > FIT}


def _probe(state: Tensor) -> Tensor:
    """(values,) of the first tokens, float64 on the CPU."""
    return state.flatten(0, -2)[:PROBE].flatten().double().cpu()


class _Compressed:
    """One block of the compressed model: every group is compressed when its input is there.

    Attributes:
        groups: those that are done, by name.
    """

    def __init__(
        self,
        owner: SequentialGroups,
        members: list[tuple[Layer, nn.Linear]],
        dense: _Dense,
        stream: dict[str, float],
        gap: Tensor,
    ) -> None:
        self.owner, self.dense, self.stream, self.gap = owner, dense, stream, gap
        self.stacks: dict[str, list[tuple[Layer, nn.Linear]]] = {}
        for layer, module in members:
            self.stacks.setdefault(owner.statistics.group_of(layer.name), []).append((layer, module))
        self.groups: dict[str, Group] = {}

    def run(self, forward: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
        """The block's hidden states (samples, length, hidden) once its layers are compressed."""
        with ExitStack() as stack:
            for name, members in self.stacks.items():
                for layer, module in members:
                    stack.callback(module.register_forward_pre_hook(partial(self._meet, name)).remove)
                    if layer.name in self.stream:
                        stack.callback(module.register_forward_hook(partial(self._wrote, layer.name)).remove)
            return forward(state)

    def _meet(self, name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Before the first layer of a group runs: compress the group, in float32 whatever the forward pass is in."""
        if name not in self.groups:
            with self.owner.products(low=False):
                self.groups[name] = self._compress(name, arguments[0])

    def _compress(self, name: str, x: Tensor) -> Group:
        members = self.stacks[name]
        own = self.dense.inputs.get(members[0][0].name)
        if own is None or own.shape != x.shape:
            raise HwpqError(
                "it is fed by other tokens than in the dense model",
                where=name,
                remedy="Take preset admm, or set sequential to false: this architecture routes tokens by their values.",
            )
        original = torch.cat([module.weight for _, module in members])
        rows = x.flatten(0, -2).to(self.owner.dtype)
        sums = Gram(rows.shape[-1], rows.device)
        for part in rows.split(BATCH):
            sums.add(part)
        gram = sums.result().to(rows.device)
        missing = self._missing(members, original, own, x)
        target = corrected_target(original, gram, missing, damping=self.owner.damping, where=name)
        layers = tuple(layer for layer, _ in members)
        group = Group(name, layers, LiveStatistics(name, gram), target, target)
        for step in self.owner.steps:
            group = step(group)
        modules = dict(members)
        for layer, part in group.rows:
            modules[layer].weight.copy_(group.weight[part])
        return group

    def _missing(self, members: list[tuple[Layer, nn.Linear]], original: Tensor, own: Tensor, x: Tensor) -> Tensor:
        """(rows, in_features) Σ (t − W₀x̃) x̃ᵀ of what the outputs lack; `own` are the dense model's inputs.

        A writer's outputs are wanted themselves: W₀x̃ is worked out. Of the others `t − W₀x̃ = W₀(x − x̃)`, and one
        product serves all rows: `W₀ Σ (x − x̃) x̃ᵀ`.
        """
        shift = None
        parts = []
        heights = [layer.shape[0] for layer, _ in members]
        for (layer, module), part in zip(members, original.split(heights), strict=True):
            if layer.name in self.stream:
                with self.owner.products(low=True):
                    given = nn.functional.linear(x, module.weight, module.bias).float()
                lacking = self.dense.outputs[layer.name] + self.gap / self.stream[layer.name] - given
                parts.append(self._sum(lacking, x))
            else:
                shift = self._sum(own.float() - x.float(), x) if shift is None else shift
                parts.append(part @ shift)
        return torch.cat(parts)

    def _sum(self, lacking: Tensor, x: Tensor) -> Tensor:
        """(features of `lacking`, of `x`) Σ over tokens of their products, added up in float32."""
        pairs = zip(*(rows.flatten(0, -2).to(self.owner.dtype).split(BATCH) for rows in (lacking, x)), strict=True)
        first, second = next(pairs)
        total = (first.T @ second).float()
        for first, second in pairs:
            total += first.T @ second
        return total

    def _wrote(self, name: str, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        """After a layer has written to the stream: what is missing there now."""
        self.gap = self.gap + self.stream[name] * (self.dense.outputs[name].float() - output.float())
