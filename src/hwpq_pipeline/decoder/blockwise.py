"""A causal LM of which one decoder block at a time has weights.

The model is built from its config without weights, as `from_pretrained` builds it: for an export, with the modules of
compressed-tensors. What is outside of the blocks is read at once, and a block when its turn comes; then its weights are
let go. So memory holds the embedding, the head and one block, whatever the model's size. Names go through transformers'
own conversions (`checkpoints.conversion`), so experts that the files hold one by one come out joined. Codes are
unpacked to `scale · code` by compressed-tensors itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwpq_pipeline.checkpoints.buffers import compute_buffers
from hwpq_pipeline.checkpoints.conversion import Source, parameters_of_files
from hwpq_pipeline.checkpoints.layers import find_blocks, meta_model
from hwpq_pipeline.checkpoints.quiet import quiet_transformers
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.decoder.loading import CODES, refuse_keys
from hwpq_pipeline.decoder.memory import keep_freed_memory, return_freed_memory
from hwpq_pipeline.errors import reading

#: Bytes of a block's weights above which freed memory is returned to the system (`decoder.memory`).
LARGE = 2**26


class BlockwiseModel:
    """A causal LM in evaluation mode, its decoder blocks empty.

    Args:
        directory: a dense checkpoint or an export. It may hold tensors that the model does not read.
        dtype: that it runs in.
        remedy: what the user does about a checkpoint that does not load.
        device: where it runs.
        head: whether the head is wanted; a head of its own stays empty otherwise.

    Attributes:
        model: the model.
        blocks: its decoder blocks.

    Raises:
        HwpqError: the checkpoint is not whole, transformers cannot build it, weights are missing or of another shape,
            or codes are not read.
    """

    def __init__(
        self,
        directory: str | Path,
        dtype: torch.dtype,
        *,
        remedy: str,
        device: torch.device | str = "cpu",
        head: bool = True,
    ) -> None:
        self.checkpoint, self.remedy, self.device = Checkpoint(directory), remedy, torch.device(device)
        with reading(directory, what="transformers cannot load it", remedy=remedy), quiet_transformers():
            self.quantizer = _quantizer(self.checkpoint)
            self.model = _without_weights(directory, self.quantizer, dtype)
        self.blocks_name, self.blocks = find_blocks(self.model, str(directory))
        self._exact = self.model._get_dtype_plan(dtype)  # noqa: SLF001 (what transformers keeps in float32)
        self.sources = parameters_of_files(self.model, self.checkpoint.names, self.quantizer)
        self._check_whole(str(directory))
        largest = max(sum(part.nbytes for part in block.parameters()) for block in self.blocks)
        self._manage_memory = return_freed_memory if largest > LARGE else keep_freed_memory
        self._manage_memory()
        prefixes = [f"{self.blocks_name}."]
        if not head and (own := self._own_head()) is not None:
            prefixes.append(f"{own}.")
        self._fill(name for name in self.sources if not name.startswith(tuple(prefixes)))
        for name, buffer in self.model.named_buffers():
            _put(self.model, name, buffer.to(self.device))
        self._empty = [(module, _state(module)) for module in self.blocks.modules()]
        with quiet_transformers():
            self.model.tie_weights(missing_keys=self._missing)
        for module in self.model.modules():
            if not any(parameter.is_meta for parameter in module.parameters()):
                _unpack(module)

    def _own_head(self) -> str | None:
        head = self.model.get_output_embeddings()
        if head is None or head.weight is self.model.get_input_embeddings().weight:
            return None
        return next(name for name, module in self.model.named_modules() if module is head)

    def _check_whole(self, where: str) -> None:
        """Refuse weights that are missing or of another shape, and codes that are not read."""
        expected = self.model.state_dict()
        self._missing = {name for name in expected if name not in self.sources}
        tied = getattr(self.model, "all_tied_weights_keys", {})
        read = {name for source in self.sources.values() for name in source.patterns}
        wrong = {
            "missing keys": [name for name in self._missing if name not in tied],
            "mismatched keys": [
                name
                for name, source in self.sources.items()
                if source.converter is None
                and [self.checkpoint.shape(file) for file in source.patterns] != [tuple(expected[name].shape)]
            ],
            "unexpected keys": [name for name in self.checkpoint.names if name not in read and CODES.search(name)],
        }
        refuse_keys(wrong, where, self.remedy)

    def parameters(self) -> dict[str, Tensor]:
        """The model's parameters by name, tied ones under all their names."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    def forget_embedding(self) -> None:
        """Let the input embedding go, once no tokens are to be embedded any more."""
        table = self.model.get_input_embeddings()
        table.weight = nn.Parameter(table.weight.to("meta"), requires_grad=False)
        self._manage_memory()

    @contextmanager
    def filled(self, number: int) -> Iterator[nn.Module]:
        """A decoder block with its weights, which are let go in the end.

        Args:
            number: of the block.

        Raises:
            HwpqError: a weight cannot be read, or is not as it was written.
        """
        prefix, block = f"{self.blocks_name}.{number}.", self.blocks[number]
        try:
            self._fill(name for name in self.sources if name.startswith(prefix))
            for module in block.modules():
                _unpack(module)
            yield block
        finally:
            inside = {id(module) for module in block.modules()}
            for module, state in self._empty:
                if id(module) in inside:
                    _restore(module, state)
            self._manage_memory()

    def _fill(self, names: Iterable[str]) -> None:
        """Read parameters and buffers."""
        for name in names:
            _put(self.model, name, self._read(name))

    def _read(self, name: str) -> Tensor:
        """A parameter or buffer as the model has it."""
        source = self.sources[name]
        wanted = self.model.get_parameter_or_buffer(name).dtype
        if any(pattern in name for pattern in self._exact):
            wanted = torch.float32
        if source.converter is None:
            (file,) = source.patterns
            return self.checkpoint.tensor(file).to(self.device, wanted)
        with reading(f"{self.checkpoint.path}: {name}", remedy=self.remedy):
            return self._converted(name, source).to(self.device, wanted)

    def _converted(self, name: str, source: Source) -> Tensor:
        """A parameter that transformers makes of several tensors of the files, or of one in another form."""
        converter = deepcopy(source.converter)
        for file, pattern in source.patterns.items():
            converter.add_tensor(name, file, pattern, self.checkpoint.tensor(file))
        made = converter.convert(name, model=self.model, config=self.model.config, hf_quantizer=self.quantizer)[name]
        found: Tensor = made[0] if isinstance(made, list) else made
        return found


def _quantizer(checkpoint: Checkpoint) -> Any:
    """What transformers loads a quantized checkpoint with; None for a dense one."""
    if (config := checkpoint.config.get("quantization_config")) is None:
        return None
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(dict(config), pre_quantized=True)
    quantizer.validate_environment(device_map=None, weights_only=True)
    return quantizer


def _without_weights(directory: str | Path, quantizer: Any, dtype: torch.dtype) -> Any:
    """The model on the meta device, but for buffers that no file holds: those have their values."""
    model = meta_model(directory, dtype)
    with torch.no_grad():
        compute_buffers(model)  # first: transformers' `initialize_weights` takes no integers
    if quantizer is not None:
        quantizer.preprocess_model(model=model)
        if (hook := getattr(model, "ct_decompress_hook", None)) is not None:  # it would unpack all blocks at once
            hook.remove()
    if any(hasattr(module, "is_concatenated") for module in model.modules()):  # experts in transformers' common form
        model.set_experts_implementation("eager")
    return model.eval()


def _unpack(module: nn.Module) -> None:
    """Put `scale · code` in the place of a module's codes, if it has any."""
    if getattr(module, "quantization_scheme", None) is not None:
        from compressed_tensors.compressors.base import decompress_module

        decompress_module(module)


def _put(model: Any, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:  # noqa: SLF001 (setattr would refuse another shape's or dtype's check)
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)  # noqa: SLF001
    else:
        module._buffers[leaf] = tensor  # noqa: SLF001


def _state(module: Any) -> dict[str, Any]:
    """All that filling and unpacking change in a module."""
    return {
        "_parameters": dict(module._parameters),  # noqa: SLF001
        "_buffers": dict(module._buffers),  # noqa: SLF001
        "quantization_status": getattr(module, "quantization_status", None),
    }


def _restore(module: Any, state: Mapping[str, Any]) -> None:
    for name in ("_parameters", "_buffers"):
        own = getattr(module, name)
        own.clear()
        own.update(state[name])
    if state["quantization_status"] is not None:
        module.quantization_status = state["quantization_status"]
