"""Which tensors of a compressed-tensors export hold codes, and which modules each scheme is for."""

from __future__ import annotations

from hwpq_pipeline.checkpoints.compressed import CompressedModel
from hwpq_pipeline.checkpoints.layers import Layer, LayerMap
from hwpq_pipeline.compression.grids import GRIDS


class StoredLayers:
    """How an export's files hold the compressed layers.

    A layer that was rounded is stored in codes where its weight is a tensor of its own. Where it is a part of another
    (an expert in a stack, a transposed weight), no engine looks for codes: there its values `scale · code` are stored.

    Args:
        layers: of the dense model.
        compressed: the compressed model.

    Attributes:
        packed: the layers that are stored in codes, by the name of their tensor.
        valued: the others that were compressed, by the name of the tensor that they lie in.
        demoted: names of those among them whose codes could not be stored beside the others'.
        tables: the embedding and the head where they are rounded, by the name of their tensor.
        tied: modules that share each table, by the name of its tensor.
        unpacked: whether transformers must unpack the codes when it loads them: the model does not call all of these
            layers as modules of their own, or codes are 4-bit floats, which the library else unpacks to bfloat16 in
            a model of any dtype.
    """

    def __init__(self, layers: LayerMap, compressed: CompressedModel) -> None:
        self.compressed = compressed
        self.packed: dict[str, Layer] = {}
        self.valued: dict[str, list[Layer]] = {}
        for layer in layers:
            if layer.name in compressed.quantized and layer.packs:
                self.packed[layer.stored.tensor] = layer
            elif layer.name in compressed.layers:
                self.valued.setdefault(layer.stored.tensor, []).append(layer)
        self.tables = {table.stored.tensor: table for table in layers.tables if table.name in compressed.embeddings}
        self.tied = {
            name: [alias.removesuffix(".weight") for alias, original in layers.tied.items() if original == place]
            for name, place in ((name, table.place.tensor) for name, table in self.tables.items())
        }
        self.unpacked = any(not layer.called or _four_bits(compressed, layer) for layer in self.packed.values())
        self.formats = {layer.name: compressed.format_of(layer.name) for layer in self.packed.values()}
        self.demoted: list[str] = []
        if self.unpacked and compressed.formats:  # transformers unpacks all layers by one scheme
            for tensor, layer in list(self.packed.items()):
                if self.formats[layer.name] != compressed.formats[0]:
                    self.valued[tensor] = [self.packed.pop(tensor)]
                    self.demoted.append(layer.name)

    def schemes(self) -> dict[tuple[str, int | None], list[str]]:
        """The modules of each pair of grid and group size; `Linear` where there is one pair alone."""
        found: dict[tuple[str, int | None], list[str]] = {}
        for layer in self.packed.values():
            found.setdefault(self.formats[layer.name], []).append(module_of(layer))
        return found if len(found) > 1 or self.tables else {pair: ["Linear"] for pair in found}

    def table_schemes(self) -> dict[str, list[str]]:
        """The modules of each grid of the embedding and the head, tied ones included."""
        found: dict[str, list[str]] = {}
        for name, table in self.tables.items():
            found.setdefault(self.compressed.embeddings[table.name], []).extend([module_of(table), *self.tied[name]])
        return found


def module_of(layer: Layer) -> str:
    """Path of a layer's module in the tree."""
    return layer.place.tensor.removesuffix(".weight")


def _four_bits(compressed: CompressedModel, layer: Layer) -> bool:
    return GRIDS[compressed.format_of(layer.name)[0]].coarsening
