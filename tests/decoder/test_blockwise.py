"""A model a decoder block at a time, beside the same model whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hwpq_pipeline.checkpoints.layers import body_of
from hwpq_pipeline.checkpoints.writer import write_weights
from hwpq_pipeline.decoder import walk
from hwpq_pipeline.decoder.blocks import Inputs, record_inputs
from hwpq_pipeline.decoder.blockwise import BlockwiseModel
from hwpq_pipeline.decoder.loading import load_causal_lm
from hwpq_pipeline.decoder.spool import Spool
from hwpq_pipeline.decoder.walk import final_states
from hwpq_pipeline.errors import HwpqError
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tokens

TOKENS = tiny_tokens(5, 24)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("blockwise") / "model")


def opened(path: Path, dtype: torch.dtype = torch.float32) -> BlockwiseModel:
    return BlockwiseModel(path, dtype, remedy="Make it again.")


def empty(blockwise: BlockwiseModel) -> list[bool]:
    return [all(part.is_meta for part in block.parameters()) for block in blockwise.blocks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_states_are_those_of_the_whole_model_to_the_bit(model: Path, dtype: torch.dtype) -> None:
    whole, told = load_causal_lm(model, dtype, remedy="r"), []
    states = final_states(opened(model, dtype), TOKENS.split(2), progress=lambda *done: told.append(done))
    with torch.inference_mode():
        for ids, found in zip(TOKENS.split(2), states, strict=True):
            assert torch.equal(found, body_of(whole)(input_ids=ids, use_cache=False).last_hidden_state.float())
    assert told == [(1, 2), (2, 2)]


def test_one_block_at_a_time_has_weights(model: Path) -> None:
    blockwise = opened(model)
    assert empty(blockwise) == [True, True]
    for number in (1, 0):
        with blockwise.filled(number) as block:
            assert empty(blockwise) == [number != 0, number != 1]
            stored = load_file(model / "model.safetensors")[f"model.layers.{number}.mlp.up_proj.weight"]
            assert torch.equal(block.get_parameter("mlp.up_proj.weight"), stored.float())
    assert empty(blockwise) == [True, True]


PEAK = """
import sys, torch
from pathlib import Path
from hwpq_pipeline.decoder.blockwise import BlockwiseModel
from hwpq_pipeline.decoder.walk import final_states
ids = torch.zeros(2, 8, dtype=torch.int64)
list(final_states(BlockwiseModel(sys.argv[1], torch.float32, remedy="r"), ids.split(1)))
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    def peak(model: Path) -> int:
        command = [sys.executable, "-c", PEAK, str(model)]
        return 1024 * int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    width = 512
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_key_value_heads": 4}
    shallow, deep = (
        tiny_checkpoint(tmp_path / str(blocks), tiny_config(**sizes, num_hidden_layers=blocks)) for blocks in (2, 12)
    )
    block = 4 * (4 + 3 * 4) * width**2
    assert peak(deep) - peak(shallow) < 3 * block  # of ten


@pytest.mark.parametrize("damage", ["missing", "shape", "bit"])
def test_a_damaged_checkpoint_is_one_line(model: Path, tmp_path: Path, damage: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((model / file).read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
    (tmp_path / "model.safetensors").unlink()
    write_weights(tmp_path, tensors.items())
    if damage == "bit":
        raw = bytearray((tmp_path / "model.safetensors").read_bytes())
        at = raw.find(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
        raw[at] ^= 1
        (tmp_path / "model.safetensors").write_bytes(raw)
    said = {"missing": "1 missing keys, first", "shape": "1 mismatched keys, first", "bit": ""}[damage]
    with pytest.raises(HwpqError, match=rf"{said}.*{name}"):
        list(final_states(opened(tmp_path), [TOKENS]))


def test_blocks_that_hand_on_more_than_hidden_states_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*arguments: Any) -> Any:
        hidden, extra = record_inputs(*arguments)
        return hidden, [[Inputs(one.positional, {**one.keyword, "more": 1}, one.name) for one in extra[0]]]

    monkeypatch.setattr(walk, "record_inputs", other)
    with pytest.raises(HwpqError, match=r"model\.layers\.0.*depends on the blocks before it"):
        list(final_states(opened(model), [TOKENS]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("in_memory", [0, 100, 2**20])
def test_a_spool_gives_back_what_it_was_given(tmp_path: Path, dtype: torch.dtype, in_memory: int) -> None:
    tensors = [(torch.randn(2, 3, size) * 9).to(dtype) for size in (4, 5, 6)]
    spool = Spool(tensors[:2], tmp_path, in_memory)
    spool.append(tensors[2])
    assert len(spool) == 3
    assert all(map(torch.equal, spool, tensors))
    spool[1] = tensors[2]
    assert torch.equal(spool[1], tensors[2])
    assert bool(list(tmp_path.iterdir())) == (in_memory < 2**20)
    spool.close()
    assert not list(tmp_path.iterdir())
