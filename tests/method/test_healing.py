"""Healing, on a tiny model: its loss and gradient against autograd, its mask, its grid, its budget, its kills."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from hwpq_pipeline.checkpoints.compressed import CompressedModel, open_compressed
from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.compression.codes import dequantize, on_grid
from hwpq_pipeline.compression.grids import GRIDS
from hwpq_pipeline.decoder.head import Head
from hwpq_pipeline.decoder.loading import load_causal_lm
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.export.compressed_tensors import export_checkpoint
from hwpq_pipeline.method import healing as healing_module
from hwpq_pipeline.method.healed import samples_needed, write_healed
from hwpq_pipeline.method.healing import cycle, divergence_at, heal
from hwpq_pipeline.method.healing_state import State, key_of
from hwpq_pipeline.method.presets import HEALING
from hwpq_pipeline.method.recipe import Recipe
from hwpq_pipeline.method.run import write_model
from hwpq_pipeline.method.student import Student
from hwpq_pipeline.variant import Variant
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tokens

TOKENS = torch.as_tensor(tiny_tokens(100, 32))
SHORT = {"tokens": 96 * 32, "minutes": 60, "batch": 4, "learning_rate": 5e-3, "held_out": 4}
SPARSE = {"selection": {"structure": "2of4"}, "recovery": {"preset": "fast"}}
INT4 = {"quantization": {"grid": "int4", "group_size": 32, "method": "coordinate_descent"}}
CPU = torch.device("cpu")


def recipe(**changes: Any) -> Recipe:
    return Recipe.from_variant(Variant.model_validate({"description": "d", **SPARSE, **changes}).model_dump())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hwpq_pipeline.calibration.statistics import collect_statistics

    root = tmp_path_factory.mktemp("healing")
    tiny_checkpoint(root / "model", tiny_config(hidden_size=64))
    collect_statistics(root / "model", TOKENS[:8], target=root / "statistics")
    return root / "model"


def compressed(model: Path, target: Path, made: Recipe) -> Path:
    target.mkdir()
    write_model(model, model.parent / "statistics", made, target, name="v", tokens=TOKENS[:8])
    return target


def healed(model: Path, tmp_path: Path, made: Recipe, name: str = "healed") -> Path:
    before = tmp_path / "before"
    if not before.exists():
        compressed(model, before, made)
    (tmp_path / name).mkdir()
    states = tmp_path / f"states-{name}"
    write_healed(model, before, made, tmp_path / name, tokens=TOKENS, states=states, device=CPU)
    assert len(list(states.iterdir())) == 1  # it stays until the result is in its place
    return tmp_path / name


def weights(model: Path, path: Path) -> dict[str, torch.Tensor]:
    held = CompressedModel(path)
    return {layer.name: held.dequantized(layer.name, layer.shape, torch.float32) for layer in layer_map(model)}


def divergence(dense: Any, other: Any, ids: torch.Tensor) -> float:
    """The oracle: transformers' own logits, the formula written out in float64."""
    with torch.inference_mode():
        p, q = (torch.softmax(one(input_ids=ids).logits.double(), -1) for one in (dense, other))
    return float((p * (p.log() - q.log())).sum(-1).mean())


def test_loss_and_gradient_are_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that do not divide the tokens, against one float64 graph of the formula."""
    monkeypatch.setattr(healing_module, "PIECE", 3)
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(50, 16, generator=generator) for _ in range(2))
    wanted, given = (torch.randn(2, 5, 16, generator=generator) for _ in range(2))
    nothing = torch.nn.Identity()
    loss, gradient = divergence_at(Head(nothing, one, None), Head(nothing, other, None), wanted, given)
    exact = given.double().requires_grad_()
    p = (wanted.double() @ one.double().T).softmax(-1)
    q = (exact @ other.double().T).log_softmax(-1)
    formula = (p * (p.log() - q)).sum() / 10
    formula.backward()
    assert loss == pytest.approx(float(formula.detach()), rel=1e-5)
    assert exact.grad is not None
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("grid", [{}, INT4, {"quantization": {"grid": "fp8_e4m3"}}], ids=["values", "int4", "fp8"])
def test_healing_helps_and_keeps_mask_and_grid(model: Path, tmp_path: Path, grid: dict[str, Any]) -> None:
    made = recipe(healing=SHORT, **grid)
    before, after = compressed(model, tmp_path / "before", made), healed(model, tmp_path, made)
    held, old, new = CompressedModel(after), weights(model, before), weights(model, after)
    for layer in layer_map(model):
        assert not bool(new[layer.name][old[layer.name] == 0].any())
        if grid:
            found = held.read_quantized(layer.name, layer.shape)
            given = CompressedModel(before).read_quantized(layer.name, layer.shape)
            assert torch.equal(found.scale, given.scale) == GRIDS[found.grid].is_float  # those of integers learn
            assert on_grid(found.codes, GRIDS[found.grid])
    assert any(not torch.equal(old[name], new[name]) for name in old)
    export_checkpoint(model, before, tmp_path / "export-before")
    export_checkpoint(model, after, tmp_path / "export-after")
    paths = (model, tmp_path / "export-before", tmp_path / "export-after")
    models = [load_causal_lm(path, torch.float32, remedy="r") for path in paths]
    held_out = TOKENS[-4:]
    assert divergence(models[0], models[2], held_out) < 0.95 * divergence(models[0], models[1], held_out)


def test_the_gradient_of_a_scale_is_the_formulas(model: Path, tmp_path: Path) -> None:
    """Against differences of `Σ g · w` in float64, the codes holding still; the weights get `m` times theirs."""
    student = Student(model, CompressedModel(compressed(model, tmp_path / "before", recipe(**INT4))), CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factor in student.factors:
            factor.copy_(1 + 0.1 * torch.randn(factor.shape, generator=generator))
    parameters = dict(student.model.named_parameters())
    given = {}
    for layer in student.layers:
        parameter = parameters[layer.place.tensor]
        given[layer.name] = torch.randn(parameter.shape, generator=generator)
        parameter.grad = given[layer.name].clone()
    student.take_gradients()
    masters = dict(zip((layer.place.tensor for layer in student.layers), student.masters, strict=False))
    for layer, factor in zip(student.layers, student.factors, strict=True):
        held = CompressedModel(tmp_path / "before").read_quantized(layer.name, layer.shape)
        steps = (held.codes.double() * held.scale.double().repeat_interleave(32, 1)).unflatten(1, (-1, 32))
        own = given[layer.name].double().unflatten(1, (-1, 32))
        assert factor.grad is not None
        torch.testing.assert_close(factor.grad.double(), (own * steps).sum(-1), rtol=1e-4, atol=1e-6)
        kept = steps.flatten(1) != 0
        expected = given[layer.name] * factor.detach().repeat_interleave(32, 1) * kept
        gradient = masters[layer.place.tensor].grad
        assert gradient is not None
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


def test_scales_that_learnt_are_numbers_of_the_checkpoints_dtype(tmp_path: Path) -> None:
    from hwpq_pipeline.calibration.statistics import collect_statistics

    tiny_checkpoint(tmp_path / "model", tiny_config(hidden_size=64), dtype=torch.bfloat16)
    collect_statistics(tmp_path / "model", TOKENS[:8], target=tmp_path / "statistics")
    after = healed(tmp_path / "model", tmp_path, recipe(healing=SHORT, **INT4))
    held, export = CompressedModel(after), export_checkpoint(tmp_path / "model", after, tmp_path / "export")
    stored = Checkpoint(export)
    for layer in layer_map(tmp_path / "model"):
        scale = held.read_quantized(layer.name, layer.shape).scale
        assert torch.equal(scale, scale.bfloat16().float())
        assert torch.equal(stored.tensor(f"{layer.name}.weight_scale").float(), scale)


def test_norms_learn_and_are_exported_and_the_rest_is_untouched(model: Path, tmp_path: Path) -> None:
    after = healed(model, tmp_path, recipe(healing=SHORT))
    replaced = CompressedModel(after).replaced()
    assert set(replaced) == {
        f"model.layers.{block}.{norm}.weight"
        for block in range(layer_map(model).blocks)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    dense, (overlaid, _) = Checkpoint(model), open_compressed(model, after)
    assert any(not torch.equal(dense.tensor(name), overlaid.tensor(name)) for name in replaced)
    export_checkpoint(model, after, tmp_path / "export")
    export = Checkpoint(tmp_path / "export")
    for name in dense.names:
        if "norm" in name or "embed" in name:
            expected = replaced.get(name, dense.tensor(name)).to(dense.tensor_dtype(name))
            assert torch.equal(export.tensor(name), expected)


def test_rounded_embeddings_stay_and_the_layers_heal_under_them(model: Path, tmp_path: Path) -> None:
    made = recipe(healing=SHORT, quantization={**INT4["quantization"], "embeddings": "int8"})
    before, after = compressed(model, tmp_path / "before", made), healed(model, tmp_path, made)
    (table,) = layer_map(model).tables
    kept, given = (CompressedModel(place).read_quantized(table.name, table.shape) for place in (after, before))
    assert torch.equal(kept.codes, given.codes)
    assert torch.equal(kept.scale, given.scale)
    learns = Student(model, CompressedModel(before), CPU).model.get_input_embeddings().weight
    assert torch.equal(learns, given.codes.float() * given.scale)
    assert not learns.requires_grad


def test_a_seed_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    made = recipe(healing=SHORT, **INT4)
    one, two = healed(model, tmp_path, made, "one"), healed(model, tmp_path, made, "two")
    files = sorted(file.name for file in one.iterdir())
    assert files == sorted(file.name for file in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)
    other = replace(made, healing=replace(made.healing or HEALING, seed=1))
    three = healed(model, tmp_path, other, "three")
    assert any((one / name).read_bytes() != (three / name).read_bytes() for name in files)


@pytest.mark.parametrize("grid", [{}, INT4], ids=["values", "int4"])
def test_one_that_was_killed_goes_on_and_ends_the_same(model: Path, tmp_path: Path, grid: dict[str, Any]) -> None:
    made = recipe(healing=SHORT, **grid)
    whole = healed(model, tmp_path, made, "whole")
    held, settings = CompressedModel(tmp_path / "before"), made.healing
    assert settings is not None

    class Killed(BaseException): ...

    def kill(done: int, total: int, loss: float) -> None:
        if done == 8:
            raise Killed

    student = Student(model, held, CPU)
    state = State(tmp_path / "others", "v", key_of(model, student, TOKENS, settings))
    with pytest.raises(Killed):
        heal(model, student, TOKENS, settings, state=state, report=kill)
    assert state.file.is_file()
    seen: list[int] = []
    again = Student(model, held, CPU)
    heal(model, again, TOKENS, settings, state=state, report=lambda done, *_: seen.append(done))
    assert seen[0] == 7  # step 6 was written, so it is not taken again
    expected = weights(model, whole)
    found = {layer.name: made for layer, made in again.results()}
    for name, weight in expected.items():
        again_made = found[name]
        assert torch.equal(again_made if isinstance(again_made, torch.Tensor) else dequantize(again_made), weight)


def test_a_damaged_state_is_as_good_as_none(model: Path, tmp_path: Path) -> None:
    made = recipe(healing=SHORT)
    before = compressed(model, tmp_path / "before", made)
    assert made.healing is not None
    student = Student(model, CompressedModel(before), CPU)
    state = State(tmp_path / "states", "v", key_of(model, student, TOKENS, made.healing))
    state.file.parent.mkdir()
    state.file.write_bytes(b"not one")
    seen: list[int] = []
    heal(model, student, TOKENS, made.healing, state=state, report=lambda done, *_: seen.append(done))
    assert seen[0] == 1


def test_minutes_end_the_cycle_at_its_low_end(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each look at the clock takes ten of its sixty seconds."""
    made = recipe(healing={**SHORT, "minutes": 1})
    before = compressed(model, tmp_path / "before", made)
    assert made.healing is not None
    student = Student(model, CompressedModel(before), CPU)
    seconds = iter(range(0, 10**6, 10))
    seen: list[int] = []
    heal(
        model, student, TOKENS, made.healing, state=State(tmp_path / "states", "v", "k"),
        report=lambda done, *_: seen.append(done), clock=lambda: float(next(seconds)) / 3,
    )  # fmt: skip
    assert 0 < len(seen) < 24
    assert "minutes ended it" in caplog.text


def test_what_does_not_help_is_not_kept(model: Path, tmp_path: Path) -> None:
    """A learning rate that ruins the model: the weights of the beginning come out."""
    made = recipe(healing={**SHORT, "learning_rate": 0.9})
    after = healed(model, tmp_path, made)
    old, new = weights(model, tmp_path / "before"), weights(model, after)
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_blocks_that_compute_again_give_the_same(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(healing=SHORT)
    plain = healed(model, tmp_path, made, "plain")
    monkeypatch.setattr(healing_module, "_activations", lambda *_: float("inf"))
    again = healed(model, tmp_path, made, "again")
    expected, found = weights(model, plain), weights(model, again)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


class Full:
    """A machine without free memory."""

    available = 0


def test_the_factored_moment_heals_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps as long as Adam's; a state of Adam's is no beginning for it, and its own is."""
    made = recipe(healing=SHORT)
    before, settings = compressed(model, tmp_path / "before", made), made.healing
    assert settings is not None
    student = Student(model, CompressedModel(before), CPU)
    state = State(tmp_path / "states", "v", "k")
    heal(model, student, TOKENS, settings, state=state, report=lambda *_: None)
    monkeypatch.setattr(psutil, "virtual_memory", Full)
    assert isinstance(healing_module._optimizer(student, 1e-3), torch.optim.Adafactor)
    seen: list[int] = []
    one = heal(
        model, Student(model, CompressedModel(before), CPU), TOKENS, settings, state=state,
        report=lambda done, *_: seen.append(done),
    )  # fmt: skip
    assert seen[0] == 1
    assert one[1] < 0.95 * one[0]
    seen.clear()
    again = heal(
        model, Student(model, CompressedModel(before), CPU), TOKENS, settings, state=state,
        report=lambda done, *_: seen.append(done),
    )  # fmt: skip
    assert not seen
    assert again == one


@pytest.mark.parametrize("kind", ["mixtral", "gpt2"])
def test_stacks_and_transposed_weights_heal(kind: str, tmp_path: Path) -> None:
    """Experts in a stack, and `Conv1D`: the mask holds, and the held-out divergence falls."""
    from hwpq_pipeline.calibration.statistics import collect_statistics
    from tests.architectures import save_checkpoint

    path = tmp_path / "model"
    save_checkpoint(kind, path)
    tokens = TOKENS % Checkpoint(path).config["vocab_size"]
    collect_statistics(path, tokens[:8], target=tmp_path / "statistics")
    made = recipe(healing=SHORT)
    before = tmp_path / "before"
    before.mkdir()
    write_model(path, tmp_path / "statistics", made, before, name="v", tokens=tokens[:8])
    settings = made.healing
    assert settings is not None
    student = Student(path, CompressedModel(before), CPU)
    old = {layer.name: torch.as_tensor(weight).clone() for layer, weight in student.results()}
    first, last = heal(path, student, tokens, settings, state=State(tmp_path / "s", "v", "k"), report=lambda *_: None)
    assert last < first
    new = {layer.name: torch.as_tensor(weight) for layer, weight in student.results()}
    assert len(new) == len(layer_map(path))
    for name, weight in old.items():
        assert not bool(new[name][weight == 0].any())
        assert not torch.equal(new[name], weight)


def test_fewer_tokens_than_a_batch_are_one_step(model: Path, tmp_path: Path) -> None:
    made = recipe(healing={**SHORT, "tokens": 32})
    before = compressed(model, tmp_path / "before", made)
    assert made.healing is not None
    seen: list[int] = []
    heal(
        model, Student(model, CompressedModel(before), CPU), TOKENS, made.healing,
        state=State(tmp_path / "s", "v", "k"), report=lambda done, *_: seen.append(done),
    )  # fmt: skip
    assert seen == [1]


def test_the_cycle_rises_and_falls() -> None:
    values = [cycle(share / 100) for share in range(101)]
    top = values.index(max(values))
    assert max(values) == pytest.approx(1)
    assert values[:top] == sorted(values[:top])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert 0 < values[0] < 0.15
    assert values[-1] == pytest.approx(0, abs=1e-6)


def test_too_few_samples_are_one_line(model: Path, tmp_path: Path) -> None:
    made = recipe(healing=SHORT)
    before = compressed(model, tmp_path / "before", made)
    with pytest.raises(HwpqError, match="6 samples"):
        write_healed(model, before, made, tmp_path, tokens=TOKENS[:6], states=tmp_path / "s", device=CPU)
    assert samples_needed(made, 32) == 100
    assert samples_needed(recipe(), 32) == 0


def test_the_recipe_says_how_and_is_as_it_was_without() -> None:
    made = recipe(healing={})
    assert made.healing == HEALING
    assert Recipe.from_json(made.to_json()) == made
    assert made.told()["healing"]["tokens"] == HEALING.tokens
    assert "healing" not in recipe().to_json()
    with pytest.raises(ValueError, match="healing mends"):
        Variant.model_validate({"description": "d", "healing": {}})
