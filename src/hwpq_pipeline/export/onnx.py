"""The ONNX model: what ONNX Runtime runs, on servers, phones (its Android and iOS packages) and in browsers.

Chosen over ExecuTorch because more users of small models on CPUs and phones can load it as it is: one runtime for
Python, C++, C#, Java, Swift and JavaScript, with 4-bit and 8-bit kernels for CPUs, and no tie to one release of torch,
which an ExecuTorch program has.

The graph is written here, operation by operation, not traced from torch, since a tracer would see unpacked weights:

    grid        stored                                                      computed by
    int4        two codes a byte, scale a block of 32, 64 or 128            MatMulNBits, 4 bits: `scale · (q − 8)`
    int8        a byte a code, scale a block of at most 128                 MatMulNBits, 8 bits: `scale · (q − 128)`
    fp8         float8_e4m3fn, scale a row                                  widened when the model is loaded
    none        the dense model's dtype                                     widened when the model is loaded

Codes and scales keep their values (scales as float32), also at `fp8`: no CPU kernel multiplies 8-bit floats, so FP8
saves bytes on disk and in transfer here, not in memory. Activations are float32 and not rounded by the graph. A block
must be a power of two of at least 16 columns, hence rows without groups get blocks of the largest one that divides
them. What MatMulNBits and the attention do is told by ONNX Runtime's documentation of its `com.microsoft` operators.

Inputs are `input_ids` and `attention_mask` (batch, length) and the cache, `past_key_values.<block>.{key,value}`
(batch, key heads, length, head size); outputs `logits` and `present.<block>.{key,value}`: the names that Optimum,
ONNX Runtime GenAI and Transformers.js use. Weights lie in `model.onnx.data`, so that size has no limit, and are written
a tensor at a time.

ONNX Runtime's attention takes several sequences without a cache, or one token of each with it; more tokens behind a
cache only of one sequence ("batch_size must be 1 when sequence_length > 1 and past context is given"). Batches are of
sequences of one length: padding has not been tried.

Served architecture: `llama` without biases, with plain rotary embeddings and heads of a multiple of 16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwpq_pipeline.checkpoints.compressed import CompressedModel, QuantizedLayer
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.checkpoints.writer import atomic_directory, write_json, write_text
from hwpq_pipeline.errors import HwpqError

from .card import CardInfo, render_card
from .compressed_tensors import copy_side_files

OPSET, MICROSOFT = 21, "com.microsoft"
LARGEST_BLOCK, SMALLEST_BLOCK = 128, 16
HEAD_STEP = 16  # "head_size shall be a multiple of 16", says GroupQueryAttention when it runs
_ALIGNMENT = 64
_USE_ANOTHER = "Use the compressed-tensors export for this model."


class _Graph:
    """Nodes and weights; the weights' bytes go to the data file as they come."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def node(self, operator: str, inputs: list[str], output: str | list[str], **attributes: Any) -> str:
        """Add an operation; gives back the name of its first output."""
        from onnx import helper

        outputs = [output] if isinstance(output, str) else output
        domain = MICROSOFT if operator in ("MatMulNBits", "GroupQueryAttention") else ""
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def weight(self, name: str, tensor: Tensor) -> str:
        """Add a weight of any dtype; gives back its name."""
        from onnx import TensorProto

        kinds = {
            torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16,
            torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN, torch.uint8: TensorProto.UINT8,
            torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT32,
        }  # fmt: skip
        content = tensor.contiguous().view(torch.uint8).numpy() if tensor.dim() else tensor.numpy()
        self.data.write(b"\0" * (-self.data.tell() % _ALIGNMENT))
        proto = TensorProto(
            name=name, dims=list(tensor.shape), data_type=kinds[tensor.dtype], data_location=TensorProto.EXTERNAL
        )
        places = {"location": "model.onnx.data", "offset": self.data.tell(), "length": tensor.nbytes}
        for key, value in places.items():
            proto.external_data.add(key=key, value=str(value))
        self.data.write(content.tobytes())
        self.weights.append(proto)
        return name

    def small(self, name: str, values: Any) -> str:
        """Add a constant that the graph's own shapes are worked out from; it lies in the model file."""
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(np.array(values), name))
        return name


def export_onnx(
    model_dir: str | Path, compressed_dir: str | Path, target_dir: str | Path, *, card: CardInfo | None = None
) -> Path:
    """Write one variant as `model.onnx` with `model.onnx.data`, whole or not at all.

    Args:
        model_dir: the dense checkpoint.
        compressed_dir: the format-neutral compressed model.
        target_dir: replaced when the new one is complete.
        card: what the model card says; without it the directory gets none.

    Returns:
        `target_dir`.

    Raises:
        HwpqError: an architecture that this module does not write, or a damaged input.
    """
    dense, compressed = Checkpoint(model_dir), CompressedModel(compressed_dir)
    _check_architecture(dense)
    if lost := sorted(layer for layer in compressed.layers if f"{layer}.weight" not in dense):
        raise HwpqError(
            f"the dense model has no {lost[0]}.weight",
            where=str(dense.path),
            remedy="Compress this model again: the compressed layers are of another one.",
        )
    with atomic_directory(target_dir) as partial:
        with open(partial / "model.onnx.data", "wb") as data:
            model = _Llama(dense, compressed, _Graph(data)).build()
        (partial / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
        write_json(partial / "config.json", dense.config)
        copy_side_files(Path(model_dir), partial)
        if card is not None:
            write_text(partial / "README.md", render_card(card))
    return Path(target_dir)


def _check_architecture(dense: Checkpoint) -> None:
    config = dense.config
    rope = config.get("rope_parameters") or {}
    known = config.get("model_type") == "llama" and rope.get("rope_type", "default") == "default"
    where = f"{dense.path}/config.json"
    if not known or config.get("hidden_act", "silu") != "silu" or any(name.endswith(".bias") for name in dense.names):
        raise HwpqError(
            f"no ONNX graph for model type {config.get('model_type')!r} with this rope, activation or biases",
            where=where,
            remedy=_USE_ANOTHER,
        )
    if size := _head_size(config) % HEAD_STEP:
        raise HwpqError(
            f"heads of {_head_size(config)} numbers, which is {size} more than a multiple of {HEAD_STEP}",
            where=where,
            remedy=f"ONNX Runtime's attention wants a multiple of {HEAD_STEP}. {_USE_ANOTHER}",
        )


def _head_size(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


class _Llama:
    """The graph of a Llama, written block by block."""

    def __init__(self, dense: Checkpoint, compressed: CompressedModel, graph: _Graph) -> None:
        self.dense, self.compressed, self.graph = dense, compressed, graph
        config = dense.config
        self.heads = config["num_attention_heads"]
        self.key_heads = config.get("num_key_value_heads") or self.heads
        self.head_size = _head_size(config)
        self.blocks, self.epsilon = config["num_hidden_layers"], config["rms_norm_eps"]

    def build(self) -> Any:
        """The `onnx.ModelProto`."""
        from onnx import TensorProto, helper

        graph = self.graph
        self._positions()
        embedding = self._plain("model.embed_tokens.weight")
        hidden = graph.node("Gather", [embedding, "input_ids"], "embedded")
        for block in range(self.blocks):
            hidden = self._block(block, hidden)
        hidden = self._norm("model.norm", hidden)
        head = self._plain("lm_head.weight") if "lm_head.weight" in self.dense else embedding
        turned = graph.node("Transpose", [head], "head.turned", perm=[1, 0])
        graph.node("MatMul", [hidden, turned], "logits")

        def tensor(name: str, kind: int, shape: list[Any]) -> Any:
            return helper.make_tensor_value_info(name, kind, shape)

        def cache(prefix: str, length: str) -> list[Any]:
            shape = ["batch", self.key_heads, length, self.head_size]
            return [tensor(f"{prefix}.{block}.{part}", TensorProto.FLOAT, shape)
                    for block in range(self.blocks) for part in ("key", "value")]  # fmt: skip

        inputs = [tensor("input_ids", TensorProto.INT64, ["batch", "length"]),
                  tensor("attention_mask", TensorProto.INT64, ["batch", "total"])]  # fmt: skip
        logits = tensor("logits", TensorProto.FLOAT, ["batch", "length", self.dense.config["vocab_size"]])
        made = helper.make_graph(graph.nodes, "llama", inputs + cache("past_key_values", "past"),
                                 [logits, *cache("present", "total")], initializer=graph.weights)  # fmt: skip
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(made, opset_imports=opsets, ir_version=10, producer_name="hwpq-pipeline")

    def _positions(self) -> None:
        """Lengths as the attention wants them, and the rotary tables."""
        graph, config = self.graph, self.dense.config
        total = graph.node("ReduceSum", ["attention_mask", graph.small("one", np.array([1], np.int64))], "tokens",
                           keepdims=0)  # fmt: skip
        last = graph.node("Sub", [total, graph.small("a_one", np.int64(1))], "last")
        graph.node("Cast", [last], "lengths", to=6)
        shape = graph.node("Shape", ["attention_mask"], "mask.shape")
        size = graph.node("Gather", [shape, graph.small("second", np.int64(1))], "mask.total", axis=0)
        graph.node("Cast", [size], "total", to=6)
        theta = float((config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta") or 10_000.0)
        inverse = theta ** (-torch.arange(0, self.head_size, 2, dtype=torch.float64) / self.head_size)
        angles = torch.arange(config["max_position_embeddings"], dtype=torch.float64)[:, None] * inverse
        graph.weight("cosines", angles.cos().float())
        graph.weight("sines", angles.sin().float())

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
            num_heads=self.heads,
            kv_num_heads=self.key_heads,
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
            "SimplifiedLayerNormalization", [hidden, weight], f"{name}.normed", axis=-1, epsilon=self.epsilon
        )

    def _plain(self, name: str, tensor: Tensor | None = None) -> str:
        """A weight in its own dtype, widened to float32 once, when ONNX Runtime folds constants."""
        stored = self.graph.weight(name, self.dense.finite(name) if tensor is None else tensor)
        return self.graph.node("Cast", [stored], f"{name}.float", to=1)

    def _linear(self, layer: str, hidden: str) -> str:
        graph, name = self.graph, f"{layer}.weight"
        shape, output = self.dense.shape(name), f"{layer}.out"
        if layer not in self.compressed.quantized:
            weight = (
                self.compressed.read_weight(layer, shape).to(self.dense.torch_dtype)
                if layer in self.compressed.layers
                else None
            )
            turned = graph.node("Transpose", [self._plain(name, weight)], f"{name}.turned", perm=[1, 0])
            return graph.node("MatMul", [hidden, turned], output)
        quantized = self.compressed.read_quantized(layer, shape)
        if quantized.codes.dtype == torch.int8:
            return self._integers(layer, quantized, hidden, output)
        scale = graph.weight(f"{layer}.scale", quantized.scale.float())
        scaled = graph.node("Mul", [self._plain(name, quantized.codes), scale], f"{name}.scaled")
        turned = graph.node("Transpose", [scaled], f"{name}.turned", perm=[1, 0])
        return graph.node("MatMul", [hidden, turned], output)

    def _integers(self, layer: str, quantized: QuantizedLayer, hidden: str, output: str) -> str:
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
        bits = 4 if self.compressed.grid == "int4" else 8
        codes = (quantized.codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
        if bits == 4:
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        packed = codes.view(rows, columns // block, block * bits // 8)
        scale = quantized.scale.float().repeat_interleave(columns // block // groups, dim=1)
        names = [self.graph.weight(f"{layer}.codes", packed), self.graph.weight(f"{layer}.scale", scale)]
        return self.graph.node("MatMulNBits", [hidden, *names], output, K=columns, N=rows, bits=bits, block_size=block)
