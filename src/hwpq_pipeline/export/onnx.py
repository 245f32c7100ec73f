"""The ONNX model: what ONNX Runtime runs, on servers, phones (its Android and iOS packages) and in browsers.

It was chosen over ExecuTorch because more users of small models on CPUs and phones can load it as it is. There is one
runtime for Python, C++, C#, Java, Swift and JavaScript, with 4-bit and 8-bit kernels for CPUs. An ExecuTorch program is
tied to one release of torch, an ONNX model is not.

The graph is written here, operation by operation. It is not traced from torch, since a tracer would see unpacked
weights:

    grid        stored                                                      computed by
    int4        two codes a byte, scale a block of 32, 64 or 128            MatMulNBits, 4 bits: `scale · (q − 8)`
    int8        a byte a code, scale a block of at most 128                 MatMulNBits, 8 bits: `scale · (q − 128)`
    fp8         float8_e4m3fn, scale a row                                  widened when the model is loaded
    none        the dense model's dtype                                     widened when the model is loaded

Layers may have several grids. Rounded embeddings are widened when the model is loaded, as FP8 is. Codes and scales keep
their values (scales as float32). No CPU kernel multiplies 8-bit floats, so FP8 saves bytes on
disk and in transfer here, not in memory. Activations are float32, and the graph does not round them. A block must be
a power of two and at least 16 columns, so rows without groups get the largest such block that divides them. ONNX
Runtime's documentation of its `com.microsoft` operators says what MatMulNBits and the attention do.

Inputs are `input_ids` and `attention_mask` (batch, length) and the cache, `past_key_values.<block>.{key,value}`
(batch, key heads, length, head size). Outputs are `logits` and `present.<block>.{key,value}`. Optimum, ONNX Runtime
GenAI and Transformers.js use these names. Weights are in `model.onnx.data`, so that the model may be of any size, and
are written a tensor at a time.

ONNX Runtime's attention takes several sequences without a cache, or one token of each with it. It takes more tokens
behind a cache only for one sequence ("batch_size must be 1 when sequence_length > 1 and past context is given"). The
sequences of a batch have one length: padding has not been tried.

The architecture is `llama`, with or without biases, with heads of a multiple of 16. The rotary tables hold the
frequencies of transformers, scaled or not, for the config's `max_position_embeddings` positions. The graph takes no
longer prompt. Scalings that change with the prompt's length (`dynamic`, `longrope`) have no table and are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.compressed import CompressedModel, open_compressed
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.checkpoints.side_files import copy_side_files
from hwpq_pipeline.checkpoints.writer import write_json
from hwpq_pipeline.compression.codes import Quantized
from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.compression.packing import pack_nibbles
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.runtime.onnx_session import Session

from .card import CardInfo, Storage
from .comparison import Logits, ReadBack, exact
from .formats import Format
from .llama import FIXED_ROPES, USE_ANOTHER, LlamaShape, read_llama
from .onnx_graph import MICROSOFT, Graph

OPSET = 21
LARGEST_BLOCK, SMALLEST_BLOCK = 128, 16
HEAD_STEP = 16  # "head_size shall be a multiple of 16", says GroupQueryAttention when it runs
_PIECE = 512


def export_onnx(
    model_dir: str | Path, compressed_dir: str | Path, target_dir: str | Path, *, card: CardInfo | None = None
) -> Path:
    """Write one variant as `model.onnx` with `model.onnx.data`, whole or not at all.

    Args:
        model_dir: the dense checkpoint.
        compressed_dir: the compressed model (`checkpoints.compressed`).
        target_dir: replaced when the new one is complete.
        card: what the model card says; without it the directory gets none.

    Returns:
        `target_dir`.

    Raises:
        HwpqError: an architecture that this module does not write, a damaged input, no ONNX Runtime to compare with, or
            a graph that computes something else than the compressed-tensors export.
    """
    dense, compressed = open_compressed(model_dir, compressed_dir)
    FORMAT.check_all(compressed)
    shape = _read_shape(dense)
    with FORMAT.directory(dense, compressed, target_dir, card) as partial:
        with open(partial / "model.onnx.data", "wb") as data:
            model = _Llama(dense, compressed, shape, Graph(data)).build()
        (partial / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
        write_json(partial / "config.json", dense.config)
        copy_side_files(Path(model_dir), partial)
    return Path(target_dir)


def _read_shape(dense: Checkpoint) -> LlamaShape:
    shape, where = read_llama(dense, "ONNX graph", FIXED_ROPES), f"{dense.path}/config.json"
    if over := shape.head_size % HEAD_STEP:
        raise HwpqError(
            f"heads of {shape.head_size} numbers, which is {over} more than a multiple of {HEAD_STEP}",
            where=where,
            remedy=f"ONNX Runtime's attention wants a multiple of {HEAD_STEP}. {USE_ANOTHER}",
        )
    return shape


def _tables(shape: LlamaShape) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, (context, head size / 2) float32 each.

    Without a scaling the angles are worked out in float64. With one they are transformers' own, in float32.
    """
    rope, size = shape.rope, shape.head_size
    if rope.type == "default":
        inverse = rope.theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = torch.arange(shape.context, dtype=torch.float64)[:, None] * inverse
    else:
        angles = torch.arange(shape.context, dtype=torch.float32)[:, None] * rope.frequencies
    return (angles.cos() * rope.amplitude).float(), (angles.sin() * rope.amplitude).float()


class _Llama:
    """The graph of a Llama, written block by block."""

    def __init__(self, dense: Checkpoint, compressed: CompressedModel, shape: LlamaShape, graph: Graph) -> None:
        self.dense, self.compressed, self.shape, self.graph = dense, compressed, shape, graph

    def build(self) -> Any:
        """The `onnx.ModelProto`."""
        from onnx import TensorProto, helper

        graph = self.graph
        self._positions()
        embedding = self._table("model.embed_tokens")
        hidden = graph.node("Gather", [embedding, "input_ids"], "embedded")
        for block in range(self.shape.blocks):
            hidden = self._block(block, hidden)
        hidden = self._norm("model.norm", hidden)
        head = self._table("lm_head") if "lm_head.weight" in self.dense else embedding
        turned = graph.node("Transpose", [head], "head.turned", perm=[1, 0])
        graph.node("MatMul", [hidden, turned], "logits")

        def tensor(name: str, kind: int, shape: list[Any]) -> Any:
            return helper.make_tensor_value_info(name, kind, shape)

        def cache(prefix: str, length: str) -> list[Any]:
            shape = ["batch", self.shape.key_heads, length, self.shape.head_size]
            return [tensor(f"{prefix}.{block}.{part}", TensorProto.FLOAT, shape)
                    for block in range(self.shape.blocks) for part in ("key", "value")]  # fmt: skip

        inputs = [tensor("input_ids", TensorProto.INT64, ["batch", "length"]),
                  tensor("attention_mask", TensorProto.INT64, ["batch", "total"])]  # fmt: skip
        logits = tensor("logits", TensorProto.FLOAT, ["batch", "length", self.shape.vocabulary])
        made = helper.make_graph(graph.nodes, "llama", inputs + cache("past_key_values", "past"),
                                 [logits, *cache("present", "total")], initializer=graph.weights)  # fmt: skip
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(made, opset_imports=opsets, ir_version=10, producer_name="hwpq-pipeline")

    def _positions(self) -> None:
        """Lengths as the attention wants them, and the rotary tables."""
        graph = self.graph
        total = graph.node("ReduceSum", ["attention_mask", graph.small("one", np.array([1], np.int64))], "tokens",
                           keepdims=0)  # fmt: skip
        last = graph.node("Sub", [total, graph.small("a_one", np.int64(1))], "last")
        graph.node("Cast", [last], "lengths", to=6)
        shape = graph.node("Shape", ["attention_mask"], "mask.shape")
        total = graph.node("Gather", [shape, graph.small("second", np.int64(1))], "mask.total", axis=0)
        graph.node("Cast", [total], "total", to=6)
        cosines, sines = _tables(self.shape)
        graph.weight("cosines", cosines)
        graph.weight("sines", sines)

    def _block(self, block: int, hidden: str) -> str:
        graph, name = self.graph, f"model.layers.{block}"
        normed = self._norm(f"{name}.input_layernorm", hidden)
        query, key, value = (self._linear(f"{name}.self_attn.{part}_proj", normed) for part in "qkv")
        past, present = ([f"{kind}.{block}.{part}" for part in ("key", "value")]
                         for kind in ("past_key_values", "present"))  # fmt: skip
        attended = graph.node(
            "GroupQueryAttention",
            [query, key, value, *past, "lengths", "total", "cosines", "sines"],
            [f"{name}.attended", *present],
            num_heads=self.shape.heads,
            kv_num_heads=self.shape.key_heads,
            do_rotary=1,
        )
        moved = self._linear(f"{name}.self_attn.o_proj", attended)
        hidden = graph.node("Add", [hidden, moved], f"{name}.middle")
        normed = self._norm(f"{name}.post_attention_layernorm", hidden)
        gate, up = (self._linear(f"{name}.mlp.{part}_proj", normed) for part in ("gate", "up"))
        half = graph.node("Sigmoid", [gate], f"{name}.sigmoid")
        silu = graph.node("Mul", [gate, half], f"{name}.silu")
        both = graph.node("Mul", [silu, up], f"{name}.both")
        return graph.node("Add", [hidden, self._linear(f"{name}.mlp.down_proj", both)], f"{name}.out")

    def _norm(self, name: str, hidden: str) -> str:
        weight = self.graph.weight(f"{name}.weight", self.dense.finite(f"{name}.weight").float())
        return self.graph.node(
            "SimplifiedLayerNormalization", [hidden, weight], f"{name}.normed", axis=-1, epsilon=self.shape.epsilon
        )

    def _plain(self, name: str, tensor: Tensor | None = None) -> str:
        """A weight in its own dtype, widened to float32 once, when ONNX Runtime folds constants."""
        stored = self.graph.weight(name, self.dense.finite(name) if tensor is None else tensor)
        return self.graph.node("Cast", [stored], f"{name}.float", to=1)

    def _table(self, name: str) -> str:
        """The embedding or the head; codes are widened to float32 when ONNX Runtime folds constants."""
        weight = f"{name}.weight"
        if name not in self.compressed.embeddings:
            return self._plain(weight)
        quantized = self.compressed.read_quantized(name, self.dense.shape(weight))
        scale = self.graph.weight(f"{name}.scale", quantized.scale.float())
        return self.graph.node("Mul", [self._plain(weight, quantized.codes), scale], f"{weight}.scaled")

    def _linear(self, layer: str, hidden: str) -> str:
        bias, output = f"{layer}.bias", f"{layer}.out"
        if bias not in self.dense:
            return self._product(layer, hidden, output)
        product = self._product(layer, hidden, f"{layer}.product")
        return self.graph.node("Add", [product, self._plain(bias)], output)

    def _product(self, layer: str, hidden: str, output: str) -> str:
        graph, name = self.graph, f"{layer}.weight"
        shape = self.dense.shape(name)
        if layer not in self.compressed.quantized:
            weight = (
                self.compressed.read_weight(layer, shape).to(self.dense.torch_dtype)
                if layer in self.compressed.layers
                else None
            )
            turned = graph.node("Transpose", [self._plain(name, weight)], f"{name}.turned", perm=[1, 0])
            return graph.node("MatMul", [hidden, turned], output)
        quantized = self.compressed.read_quantized(layer, shape)
        if not GRIDS[quantized.grid].is_float:
            return self._integers(layer, quantized, hidden, output)
        scale = graph.weight(f"{layer}.scale", quantized.scale.float())
        scaled = graph.node("Mul", [self._plain(name, quantized.codes), scale], f"{name}.scaled")
        turned = graph.node("Transpose", [scaled], f"{name}.turned", perm=[1, 0])
        return graph.node("MatMul", [hidden, turned], output)

    def _integers(self, layer: str, quantized: Quantized, hidden: str, output: str) -> str:
        (rows, columns), groups = quantized.codes.shape, quantized.scale.shape[1]
        block = LARGEST_BLOCK
        while columns // groups % block:
            block //= 2
        if block < SMALLEST_BLOCK:
            raise HwpqError(
                f"{columns // groups} columns a scale are not whole blocks of {SMALLEST_BLOCK}",
                where=f"{self.compressed.path}: {layer}",
                remedy="Use group_size 32, 64 or 128, or another export format.",
            )
        bits = GRIDS[quantized.grid].bits
        codes = pack_nibbles(quantized.codes) if bits == 4 else (quantized.codes.to(torch.int16) + 128).to(torch.uint8)
        packed = codes.view(rows, columns // block, block * bits // 8)
        scale = quantized.scale.float().repeat_interleave(columns // block // groups, dim=1)
        names = [self.graph.weight(f"{layer}.codes", packed), self.graph.weight(f"{layer}.scale", scale)]
        return self.graph.node("MatMulNBits", [hidden, *names], output, K=columns, N=rows, bits=bits, block_size=block)


def _open(folder: Path) -> Logits:
    """ONNX Runtime on the export; a prompt goes through it in pieces, to keep few logits at a time."""
    try:
        session = Session(folder)
    except ImportError as error:
        raise HwpqError(
            "ONNX Runtime is not installed, and only it can run the graph",
            where=str(folder),
            remedy="pip install onnxruntime, or take onnx out of export.formats.",
        ) from error

    def logits(ids: Tensor, kept: int) -> Tensor:
        session.fresh()
        pieces = [piece for piece in (*ids[:, :-kept].split(_PIECE, dim=1), ids[:, -kept:]) if piece.shape[1]]
        for piece in pieces[:-1]:
            session.logits(piece.numpy())
        return torch.from_numpy(session.logits(pieces[-1].numpy())[0])

    return logits


def _how_to_load(_info: CardInfo) -> str:
    return (
        "```bash\npip install onnxruntime transformers\n```\n\n```python\n"
        "import onnxruntime\n"
        "from transformers import AutoTokenizer\n\n"
        'session = onnxruntime.InferenceSession("path/to/this/directory/model.onnx")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")\n```\n\n'
        "Inputs are `input_ids`, `attention_mask` and `past_key_values.<block>.{key,value}`, outputs `logits` and "
        "`present.<block>.{key,value}`. Activations are not rounded by the graph."
    )


STORAGE = Storage("onnx", "onnx", _how_to_load)
_WHOLE = {name for name, grid in GRIDS.items() if grid.bits in (4, 8) and not grid.coarsening}
FORMAT = Format(
    "onnx", export_onnx, STORAGE, ReadBack(_open, exact),
    grids=tuple(name for name, grid in GRIDS.items() if grid.is_float or name in _WHOLE), mixes=True,
)  # fmt: skip
