"""ONNX Runtime on an `onnx` export, with the cache that the graph takes and gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Session:
    """A model with a cache: what is given is added to what it saw.

    Args:
        directory: an export of format `onnx`.
        threads: how many; 0 for ONNX Runtime's own choice.
    """

    def __init__(self, directory: str | Path, threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            Path(directory, "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        pasts = [entry for entry in self.session.get_inputs() if entry.name.startswith("past_key_values.")]
        self.names = [entry.name.removeprefix("past_key_values.") for entry in pasts]
        self.heads, self.size = pasts[0].shape[1], pasts[0].shape[3]
        self.cache: dict[str, Array] = {}

    def fresh(self) -> Session:
        """Forget what was seen."""
        self.cache = {}
        return self

    def logits(self, ids: Array) -> Array:
        """(batch, length) ids to (batch, length, vocabulary) logits."""
        if not self.cache:
            empty = np.zeros((ids.shape[0], self.heads, 0, self.size), np.float32)
            self.cache = {f"past_key_values.{name}": empty for name in self.names}
        past = next(iter(self.cache.values())).shape[2]
        mask = np.ones((ids.shape[0], past + ids.shape[1]), np.int64)
        given = {"input_ids": ids.astype(np.int64), "attention_mask": mask, **self.cache}
        logits, *present = self.session.run(["logits", *(f"present.{name}" for name in self.names)], given)
        self.cache = {f"past_key_values.{name}": part for name, part in zip(self.names, present, strict=True)}
        answer: Array = logits
        return answer

    def greedy(self, ids: Array, new_tokens: int) -> Array:
        """The likeliest next tokens after (batch, length) prompts: (batch, new_tokens)."""
        self.fresh()
        chosen: list[Array] = []
        for _ in range(new_tokens):
            chosen.append(self.logits(ids if not chosen else chosen[-1])[:, -1:].argmax(2))
        return np.concatenate(chosen, axis=1)
