"""Sections `linears` and `model`: the speed of what comes out, a layer at a time and for a Llama-shaped model.

The model is written here, with random weights: RMS norms, rotary attention, SwiGLU, no embeddings and no head. Prefill
is a causal forward pass over a prompt, decode one token for each of a batch against a cache of `CONTEXT` tokens. Blocks
are compiled by `torch.compile`, one at a time as users do; a decode step is replayed as a CUDA graph. Of a single layer
only what is around its product is compiled: rounding activations, scaling.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu.layers import SHAPES, make_layer
from benchmarks.gpu.linears import KINDS, MAKERS, expected
from benchmarks.gpu.timing import Bench

PREFILL, DECODE, CONTEXT = (1024, 4096, 16384), (1, 16, 64), 1024
#: Largest relative error of an output, of the form that rounds most.
TOLERANCE = {"dense_bf16": 0.01, "sparse_bf16": 0.01, "fp8": 0.06, "sparse_fp8": 0.06, "sparse_int8": 0.04}


def run_linears(bench: Bench) -> None:
    """Every form of every shape, at prefill's and at decode's numbers of tokens."""
    for model in ("tiny",) if bench.dry else ("7b", "70b"):
        for shape in SHAPES[model]:
            weight = make_layer(shape, bench.device).weight
            for kind in KINDS:
                labels: dict[str, Any] = {
                    "section": "linears",
                    "model": model,
                    "shape": f"{shape[0]}x{shape[1]}",
                    "method": kind,
                }
                with bench.guarded(**labels):
                    layer = MAKERS[kind](weight)
                    if bench.cuda:  # what is around the product, once for all numbers of tokens
                        for name in ("round", "finish"):
                            if hasattr(layer, name):
                                setattr(layer, name, torch.compile(getattr(layer, name), dynamic=True))
                    for tokens in (16, 32) if bench.dry else (*DECODE, *PREFILL):
                        x = torch.randn(tokens, shape[1], device=bench.device).bfloat16()
                        wanted = expected(kind, weight, x[:64])
                        bench.measure(
                            partial(layer, x),
                            operations=2 * tokens * shape[0] * shape[1],
                            ceiling="fp8" if "fp8" in kind else "bfloat16",
                            check=partial(check, layer, x, wanted, kind),
                            tokens=tokens,
                            budget=0.06,
                            **labels,
                        )


def check(layer: nn.Module, x: Tensor, wanted: Tensor, kind: str) -> str:
    """What is wrong with a layer's output for the first 64 tokens, or nothing; NaN does not pass."""
    error = float((layer(x)[:64].float() - wanted).norm() / wanted.norm())
    return "" if error <= TOLERANCE[kind] else f"relative error {error:.3g}"


class Block(nn.Module):
    """A decoder block: `width` features, `hidden` in the feed-forward part, heads of 128 (or 16, when tiny)."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module

    def __init__(self, width: int, hidden: int, kind: str, device: torch.device) -> None:
        super().__init__()
        self.head = 128 if width >= 1024 else 16
        make = MAKERS[kind]
        for name, shape in {
            "q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width),
            "gate": (hidden, width), "up": (hidden, width), "down": (width, hidden),
        }.items():  # fmt: skip
            setattr(self, name, make(make_layer(shape, device).weight))
        self.first, self.second = (nn.Parameter(torch.ones(width, device=device).bfloat16(), False) for _ in range(2))

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: Tensor | None) -> Tensor:
        """(batch, tokens, width); with a cache (2, batch, heads, context, head) its last place is the new token's."""
        y = functional.rms_norm(x, (x.shape[-1],), self.first)
        q, k, v = (part(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = (rotate(part, *rotation) for part in (q, k))
        if cache is None:
            seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            cache[0, :, :, -1:].copy_(k)
            cache[1, :, :, -1:].copy_(v)
            seen = functional.scaled_dot_product_attention(q, cache[0], cache[1])
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        y = functional.rms_norm(x, (x.shape[-1],), self.second)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position, by halves."""
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


def rotation(tokens: int, head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (tokens, head / 2)."""
    angle = torch.outer(
        torch.arange(tokens, device=device).float(), 10000 ** (-torch.arange(0, head, 2, device=device) / head)
    )
    return angle.cos().bfloat16(), angle.sin().bfloat16()


def run_model(bench: Bench) -> None:
    """The 7B model in each form that a layer can take here."""
    width, hidden, depth = (64, 96, 2) if bench.dry else (4096, 11008, 32)
    for kind in KINDS:
        labels: dict[str, Any] = {"section": "model", "model": "tiny" if bench.dry else "7b", "method": kind}
        with bench.guarded(**labels), torch.no_grad():
            blocks = [Block(width, hidden, kind, bench.device) for _ in range(depth)]
            if bench.cuda:
                for block in blocks:
                    block.compile(dynamic=True)  # one compilation for prompts, one for steps
            head = blocks[0].head
            for tokens in (32,) if bench.dry else PREFILL:
                x = torch.randn(1, tokens, width, device=bench.device).bfloat16()
                turn = rotation(tokens, head, bench.device)
                bench.measure(
                    partial(forward, blocks, x, turn, None),
                    phase="prefill",
                    tokens=tokens,
                    **labels,
                )
            for batch in (2,) if bench.dry else DECODE:
                with bench.guarded(phase="decode", batch=batch, **labels):
                    decode(bench, blocks, batch, width, labels)
        blocks = []
        torch._dynamo.reset()  # noqa: SLF001
        if bench.cuda:
            torch.cuda.empty_cache()


def forward(blocks: list[Block], x: Tensor, turn: tuple[Tensor, Tensor], caches: list[Tensor] | None) -> Tensor:
    """Through all blocks."""
    for number, block in enumerate(blocks):
        x = block(x, turn, None if caches is None else caches[number])
    return x


def decode(bench: Bench, blocks: list[Block], batch: int, width: int, labels: dict[str, Any]) -> None:
    """A step of one token for each of a batch."""
    head = blocks[0].head
    context = 32 if bench.dry else CONTEXT
    shape = (2, batch, width // head, context, head)
    caches = [torch.randn(shape, device=bench.device, dtype=torch.bfloat16) for _ in blocks]
    x = torch.randn(batch, 1, width, device=bench.device).bfloat16()
    turn = rotation(1, head, bench.device)

    def step() -> Tensor:
        return forward(blocks, x, turn, caches)

    call: Callable[[], Any] = step
    how = "eager"
    if bench.cuda:
        how = "compiled"
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            call, how = graph.replay, "compiled, graph"
        except RuntimeError as error:  # a library that cannot be captured; the step itself can still be timed
            how = f"compiled, no graph: {error}"[:200]
            torch.cuda.synchronize()
    weights = sum(tensor.numel() * tensor.element_size() for block in blocks for tensor in stored(block))
    bench.measure(
        call,
        moved=weights + sum(cache.nbytes for cache in caches),
        phase="decode",
        batch=batch,
        context=context,
        how=how,
        **labels,
    )


def stored(block: Block) -> list[Tensor]:
    """What a block's weights are kept in: a semi-structured tensor by its parts."""
    found = []
    for tensor in (*block.parameters(), *block.buffers()):
        packed = getattr(tensor, "packed", None)
        found.append(tensor if packed is None else packed)
    return found
