"""Compression in the order of the layers: what it sees, what it asks for, and that it pays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hwpq_pipeline.calibration.statistics import Statistics, collect_statistics
from hwpq_pipeline.checkpoints.layers import find_blocks, layer_map
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.compression.recovery import recover
from hwpq_pipeline.decoder.loading import load_dense
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.method import sequential
from hwpq_pipeline.method.blocks import Notes
from hwpq_pipeline.method.groups import Groups
from hwpq_pipeline.method.sections import Sequence
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tokens

TOKENS = tiny_tokens(32, 32)
SEQUENCE = Sequence(steps=8, damping=0.01)
SIZE: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip


def make(root, config=None) -> Groups:
    model = tiny_checkpoint(root / "model", config)
    collect_statistics(model, TOKENS, target=root / "statistics", dtype="float32")
    return Groups(Checkpoint(model), layer_map(model), Statistics(root / "statistics"))


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    return make(tmp_path_factory.mktemp("sequential"))


def walk(groups, step=lambda group: group, dtype=torch.float32):
    return list(sequential.walk_in_sequence(groups, TOKENS, step, SEQUENCE, finish=lambda group: group, dtype=dtype))


def spied(monkeypatch, look):
    """Call ``look(state, hidden states after)`` whenever a block of the compressed model has run."""
    real = sequential.run_compressed

    def run(walk, state, runs, hidden):
        yield from real(walk, state, runs, hidden)
        look(state.stream.weights, state.gap, hidden[len(runs) - 1])

    monkeypatch.setattr(sequential, "run_compressed", run)


def halved(group):
    """2:4 by magnitude, recovered."""
    fours = group.original.abs().unflatten(1, (-1, 4))
    mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(2, fours.topk(2, dim=2).indices, True).flatten(1)
    found = recover(group.original, mask, group.gram, steps=5, damping=0.01, where=group.name)
    return replace(group, weight=found.weight, mask=mask)


def hidden(groups, compressed=()):
    """Final hidden states (samples, length, hidden) with the groups' weights in place."""
    model = load_dense(groups.checkpoint.path, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        for group in compressed:
            for layer, rows in group.rows:
                model.get_submodule(layer.name).weight.copy_(group.weight[rows])
        return model.base_model(input_ids=TOKENS, use_cache=False)[0]


def test_without_steps_nothing_is_to_be_corrected(groups):
    seen, plain = walk(groups), list(groups)
    assert [group.name for group in seen] == [group.name for group in plain]
    for one, other in zip(seen, plain, strict=True):
        assert torch.allclose(one.weight, other.weight, atol=1e-4)
        # Sums over the same inputs, in other batches.
        assert torch.allclose(one.gram, other.gram, rtol=1e-3, atol=1e-2)


def test_the_statistics_are_those_of_the_compressed_model(groups, tmp_path):
    """The Gram matrices that a group saw, against statistics of the finished compressed model."""
    found = walk(groups, halved)
    model = load_dense(groups.checkpoint.path, torch.float32, torch.device("cpu"))
    for group in found:
        for layer, rows in group.rows:
            model.get_submodule(layer.name).weight.data.copy_(group.weight[rows])
    model.save_pretrained(tmp_path / "compressed")
    collect_statistics(tmp_path / "compressed", TOKENS, target=tmp_path / "statistics", dtype="float32")
    after = Statistics(tmp_path / "statistics")
    for group in found:
        expected = after.gram(group.name)
        assert torch.allclose(group.gram, expected, rtol=1e-3, atol=1e-3 * float(expected.diagonal().mean()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stream_is_nearer_the_dense_one(groups, dtype):
    dense = hidden(groups)
    plain = (hidden(groups, map(halved, groups)) - dense).square().mean()
    found = walk(groups, halved, dtype)
    corrected = (hidden(groups, found) - dense).square().mean()
    assert float(corrected) < 0.8 * float(plain)
    for group in found:
        assert bool(((group.weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())


def test_products_in_bfloat16_leave_the_steps_in_float32(groups):
    seen = []

    def step(group):
        seen.append((group.original @ group.gram, group.original, group.gram))
        return group

    for one, other in zip(walk(groups, step, torch.bfloat16), walk(groups), strict=True):
        assert torch.allclose(one.gram, other.gram, rtol=0.05, atol=0.02 * float(other.gram.diagonal().mean()))
        assert not torch.equal(one.gram, other.gram)
    for product, weight, gram in seen:
        assert product.dtype == torch.float32
        assert torch.allclose(product.double(), weight.double() @ gram.double(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_runs_on_are_the_compressed_weights(groups, monkeypatch, dtype):
    """The hidden states of the walk, against those of the finished model."""
    walked = []
    spied(monkeypatch, lambda stream, gap, after: walked.append(after))
    found = walk(groups, halved, dtype)
    model = load_dense(groups.checkpoint.path, torch.float32, torch.device("cpu"))
    finished = []
    with torch.inference_mode():
        for group in found:
            for layer, rows in group.rows:
                model.get_submodule(layer.name).weight.copy_(group.weight[rows])
        _, blocks = find_blocks(model)
        for block in blocks:
            block.register_forward_hook(lambda _, __, output: finished.append(output))
        model.base_model(input_ids=TOKENS, use_cache=False)
    for one, other in zip(walked, finished, strict=True):
        state = other[0] if isinstance(other, tuple) else other
        assert float((one - state).norm() / state.norm()) < (1e-4 if dtype == torch.float32 else 0.02)


def chunked(monkeypatch, samples=5):
    """Chunks of a few samples, though all would fit."""
    monkeypatch.setattr(sequential, "_chunks", lambda _, ids: ids.split(samples))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_give_what_all_tokens_at_once_give(groups, monkeypatch, dtype):
    # In bfloat16 nothing is pruned: two nearly equal weights would change places.
    step, tolerance = (halved, 1e-3) if dtype == torch.float32 else (lambda group: group, 0.02)
    whole = walk(groups, step, dtype)
    chunked(monkeypatch)
    for one, other in zip(whole, walk(groups, step, dtype), strict=True):
        assert one.name == other.name
        assert float((one.gram - other.gram).norm() / one.gram.norm()) < tolerance
        assert float((one.original - other.original).norm() / one.original.norm()) < 10 * tolerance
    monkeypatch.setattr("hwpq_pipeline.method.groups.LARGE", 0)  # and each layer alone
    for one in walk(groups, step, dtype):
        (layer,) = one.layers
        (stack, rows) = next((stack, rows) for stack in whole for other, rows in stack.rows if other is layer)
        assert float((one.original - stack.original[rows]).norm() / one.original.norm()) < 10 * tolerance
    monkeypatch.undo()
    monkeypatch.setattr(sequential, "ALL_AT_ONCE", 0)
    assert [group.name for group in walk(groups)] == [group.name for group in whole]


def llama():
    return tiny_config(), {"self_attn.o_proj": 1.0, "mlp.down_proj": 1.0}


def granite():
    from transformers import GraniteConfig

    config = GraniteConfig(**SIZE, residual_multiplier=0.25)
    return config, {"self_attn.o_proj": 0.25, "mlp.down_proj": 0.25}


def gpt_neox():
    """Attention and feed-forward part side by side, with biases."""
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(**SIZE), {"attention.dense": 1.0, "mlp.dense_4h_to_h": 1.0}


def olmo2():
    """Norms between the layers and the stream."""
    from transformers import Olmo2Config

    return Olmo2Config(**SIZE), {"self_attn.o_proj": 1.0, "mlp.down_proj": 1.0}


def mamba():
    """One layer writes, and a recurrence is between it and the rest."""
    from transformers import MambaConfig

    return MambaConfig(vocab_size=260, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=32), {
        "mixer.out_proj": 1.0
    }


def mixtral():
    """Experts write together, and none of them alone."""
    from transformers import MixtralConfig

    return MixtralConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2), {}


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("architecture", [llama, granite, gpt_neox, olmo2, mamba, mixtral])
def test_who_writes_to_the_stream_is_found(tmp_path, monkeypatch, architecture, at_once):
    if not at_once:
        chunked(monkeypatch, samples=16)
    config, expected = architecture()
    groups = make(tmp_path, config)
    model = load_dense(groups.checkpoint.path, torch.float32, torch.device("cpu"))
    prefix, _ = find_blocks(model)
    streams: list[dict[str, float]] = []
    gaps: list[torch.Tensor] = []

    def note(stream, gap, after):
        streams.append(stream)
        gaps.append(gap)

    spied(monkeypatch, note)
    found = walk(groups, halved)
    assert len(found) == len(groups.members())
    for number, stream in enumerate(streams):
        assert stream == pytest.approx({f"{prefix}.{number}.{name}": weight for name, weight in expected.items()})
    if not expected:
        return
    # What the last block still lacks, kept up layer by layer, is what the finished models differ by.
    states = []
    for compressed in ((), found):
        model = load_dense(groups.checkpoint.path, torch.float32, torch.device("cpu"))
        with torch.inference_mode():
            for group in compressed:
                for layer, rows in group.rows:
                    model.get_submodule(layer.name).weight.copy_(group.weight[rows])
            _, blocks = find_blocks(model)
            blocks[-1].register_forward_hook(lambda _, __, output: states.append(output))
            model.base_model(input_ids=TOKENS, use_cache=False)
    dense, last = (state[0] if isinstance(state, tuple) else state for state in states)
    assert torch.allclose(gaps[-1], (dense - last)[-len(gaps[-1]) :], atol=1e-3 * float(dense.abs().max()))


def test_tokens_that_are_routed_by_value_are_refused(tmp_path, monkeypatch):
    groups = make(tmp_path)
    real = Notes.of
    monkeypatch.setattr(Notes, "get", lambda notes, *what: real(notes, *what)[:-1])
    with pytest.raises(HwpqError, match=r"q_proj.*other tokens.*sequential"):
        walk(groups, halved)
