"""Whole small files of every kind that users give, and what reads each: `python -m tests.damaged_files FIRST COUNT`.

Damages each file with each seed and reads it: the answer is a result, or an `HwpqError` in one line. Anything else (a
traceback, more than 10 seconds, more than 1 GB beyond what the libraries take) is told. `make test-damage` runs 10,000
and writes `benchmarks/results/damage.json`.
"""

from __future__ import annotations

import gzip
import json
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hwpq_pipeline.checkpoints.layers import layer_map
from hwpq_pipeline.checkpoints.reader import Checkpoint
from hwpq_pipeline.checkpoints.sources import ModelSource, copy_checkpoint, fetch_model
from hwpq_pipeline.checkpoints.tokenizer import load_tokenizer
from hwpq_pipeline.configuration import read_yaml
from hwpq_pipeline.corpus.text_files import read_documents
from hwpq_pipeline.errors import HwpqError
from tests.damage import damaged, damaged_json
from tests.tiny import tiny_checkpoint, tiny_documents

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "damage.json"
SECONDS, BYTES = 10, 10**9
#: Of ten thousand, how many of each kind; reading a GGUF or a whole model takes longest.
SHARES = {
    "config.json": 1500, "tokenizer.json": 1000, "model.safetensors": 1500, "model.safetensors.index.json": 1000,
    "model.gguf": 1000, "text.jsonl": 1000, "text.json": 500, "text.jsonl.gz": 500, "text.parquet": 1000,
    "parameters.yml": 1000,
}  # fmt: skip


#: Seed of no damage: what is whole must be read.
WHOLE = -1


class Whole:
    """A folder with a whole file of each kind, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_checkpoint(folder / "model", max_shard_size="40KB")
        self.single = tiny_checkpoint(folder / "single")
        texts = tiny_documents(count=4, words=60)[["title", "text"]]
        records = texts.to_dict("records")
        lines = "".join(json.dumps(record) + "\n" for record in records).encode()
        (folder / "text.jsonl").write_bytes(lines)
        (folder / "text.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
        (folder / "text.json").write_text(json.dumps(records))
        texts.to_parquet(folder / "text.parquet")
        (folder / "parameters.yml").write_bytes((ROOT / "conf" / "base" / "parameters.yml").read_bytes())
        self._gguf()

    def _gguf(self) -> None:
        """A small GGUF with the tokens and tensors that transformers reads."""
        from gguf import GGUFWriter

        writer = GGUFWriter(self.folder / "model.gguf", "llama")
        for name, value in {
            "context_length": 128,
            "embedding_length": 32,
            "block_count": 1,
            "feed_forward_length": 64,
        }.items():
            writer.add_uint32(f"llama.{name}", value)
        writer.add_head_count(4)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["a", "b", "ab", *(f"t{number}" for number in range(61))])
        writer.add_token_merges(["a b"])
        shapes = {"token_embd": (64, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
        shapes |= {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
        shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", torch.rand(shape).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def read(self, kind: str, seed: int) -> None:
        """Read a damaged copy as a run would."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            _READERS[kind](self, Path(scratch), seed)

    def copy(self, source: Path, target: Path, name: str, seed: int) -> Path:
        """A checkpoint whose file of that name is damaged; the others are links."""
        target.mkdir()
        for file in source.iterdir():
            if file.name != name:
                (target / file.name).symlink_to(file)
        damage = damaged_json if name.endswith(".json") and seed % 4 else damaged
        (target / name).write_bytes(damage((source / name).read_bytes(), seed))
        return target


def _checkpoint(name: str, single: bool) -> Callable[[Whole, Path, int], None]:
    def read(whole: Whole, scratch: Path, seed: int) -> None:
        source = whole.single if single else whole.model
        copy = whole.copy(source, scratch / "model", name, seed)
        Checkpoint(copy)
        layer_map(copy)
        (scratch / "target").mkdir()
        copy_checkpoint(copy, scratch / "target", torch.float32)

    return read


def _tokenizer(whole: Whole, scratch: Path, seed: int) -> None:
    tokenizer = load_tokenizer(whole.copy(whole.single, scratch / "model", "tokenizer.json", seed))
    del tokenizer


def _gguf(whole: Whole, scratch: Path, seed: int) -> None:
    file = scratch / "model.gguf"
    file.write_bytes(damaged((whole.folder / "model.gguf").read_bytes(), seed))
    fetch_model(ModelSource("gguf", path=str(file)), scratch / "target", scratch, "float32")


def _text(name: str) -> Callable[[Whole, Path, int], None]:
    def read(whole: Whole, scratch: Path, seed: int) -> None:
        file = scratch / name
        damage = damaged_json if name == "text.json" and seed % 4 else damaged
        file.write_bytes(damage((whole.folder / name).read_bytes(), seed))
        read_documents(file, "text")

    return read


def _yaml(whole: Whole, scratch: Path, seed: int) -> None:
    file = scratch / "parameters.yml"
    file.write_bytes(damaged((whole.folder / "parameters.yml").read_bytes(), seed))
    read_yaml(file)


_READERS: dict[str, Callable[[Whole, Path, int], None]] = {
    "config.json": _checkpoint("config.json", True),
    "tokenizer.json": _tokenizer,
    "model.safetensors": _checkpoint("model.safetensors", True),
    "model.safetensors.index.json": _checkpoint("model.safetensors.index.json", False),
    "model.gguf": _gguf,
    **{name: _text(name) for name in ("text.jsonl", "text.json", "text.jsonl.gz", "text.parquet")},
    "parameters.yml": _yaml,
}


class TooSlow(Exception):
    """More than `SECONDS` for one file."""


@contextmanager
def limited() -> Iterator[None]:
    """Stop what takes more than `SECONDS`."""

    def stop(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(whole: Whole, kind: str, seed: int) -> str:
    """`read`, `refused`, or what went wrong."""
    try:
        with limited():
            whole.read(kind, seed)
    except HwpqError as error:
        line = str(error)
        return "refused" if "\n" not in line and len(line) < 1000 else f"a long line: {line[:80]}"
    except BaseException as error:  # noqa: BLE001 (that is the question)
        return f"{type(error).__name__}: {str(error)[:120]}"
    return "read"


def run(first: int, shares: dict[str, int]) -> dict[str, Any]:
    """Outcomes of damaged files, by kind; and every one that is neither read nor refused."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in shares}
    wrong: list[dict[str, Any]] = []
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        whole = Whole(Path(folder))
        for kind in shares:  # also: the libraries' own memory is no file's
            whole.read(kind, WHOLE)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for kind, count in shares.items():
            for seed in range(first, first + count):
                found = outcome(whole, kind, seed)
                counts[kind][found if found in ("read", "refused") else "wrong"] += 1
                if found not in ("read", "refused"):
                    wrong.append({"kind": kind, "seed": seed, "what": found})
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {
        "files": sum(shares.values()),
        "counts": {kind: dict(sorted(count.items())) for kind, count in counts.items()},
        "wrong": wrong,
        "memory_grew_bytes": grown,
        "seconds": round(time.perf_counter() - begun),
    }


if __name__ == "__main__":
    made = run(int(sys.argv[1]) if len(sys.argv) > 1 else 0, SHARES)
    RESULT.write_text(json.dumps(made, indent=2) + "\n")
    sys.stdout.write(json.dumps(made["counts"], indent=2) + "\n")
    if made["wrong"] or made["memory_grew_bytes"] > BYTES:
        sys.exit(f"{len(made['wrong'])} wrong, memory grew by {made['memory_grew_bytes'] / 1e6:.0f} MB: {RESULT}")
