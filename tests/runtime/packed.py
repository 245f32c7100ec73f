"""A tiny packed export with everything in it: groups of scales, biases, an embedding in codes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from hwpq_pipeline.export.semi_structured import export_semi_structured
from tests.export.making import make_two_of_four, random_codes
from tests.tiny import VOCABULARY, tiny_checkpoint, tiny_config

TABLE = "model.embed_tokens"
WIDTH = 32


def packed_export(folder: Path, *, grid: str | None = "int4", group_size: int | None = 32, codes: bool = True) -> Path:
    """Of a Llama of two blocks with biases and a tied head."""
    tiny_checkpoint(folder / "model", tiny_config(attention_bias=True))
    make_two_of_four(folder / "compressed", grid, group_size)
    if codes:
        generator = torch.Generator().manual_seed(1)
        table = random_codes("int8", (VOCABULARY, WIDTH), generator)
        scale = ((0.1 + torch.rand(VOCABULARY, 1, generator=generator)) / 200).bfloat16().float()
        save_file({f"{TABLE}.codes": table, f"{TABLE}.scale": scale}, folder / "compressed" / "table.safetensors")
        recipe = folder / "compressed" / "recipe.json"
        recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "embeddings": {TABLE: "int8"}}))
    return export_semi_structured(folder / "model", folder / "compressed", folder / "packed")
