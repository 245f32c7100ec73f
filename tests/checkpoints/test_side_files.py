"""What is copied beside the weights, and what is not."""

from __future__ import annotations

from pathlib import Path

from hwpq_pipeline.checkpoints.side_files import copy_side_files

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja",
    "generation_config.json", "LICENSE.txt", "NOTICE", "qwen.tiktoken", "special_tokens_map.json",
)  # fmt: skip
LEFT = ("config.json", "README.md", "model.safetensors", "pytorch_model.bin", "modeling_own.py", "source.json")


def test_tokenizer_template_and_licence_are_copied_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "tokenizer_parts").mkdir()  # a folder is no side file
    for name in (*COPIED, *LEFT):
        (source / name).write_text(name)
    copy_side_files(source, target)
    assert {file.name for file in target.iterdir()} == set(COPIED)
    assert all((target / name).read_text() == name for name in COPIED)
    copy_side_files(source, target, also=("README.md",))
    assert {file.name for file in target.iterdir()} == {*COPIED, "README.md"}
