"""Other people's engines, asked through a file: a request in JSON, an answer in JSON.

Each engine lives in an environment of its own under `.engines/` (`make engines`), since vLLM wants another transformers
and llama.cpp is compiled; a runner beside this file is started there and imports nothing of the project. Requests:

    {"model": path, "prompts": [[ids]], "new_tokens": n}        → {"tokens": [[ids]]}, greedily chosen
    {"model": path, "samples": [[ids]]}                         → {"nll": nats, "predictions": n}
    {"model": path, "texts": [text]}                            → {"ids": [[ids]]}                        (llama.cpp)
    {"model": path, "chat": [messages], "new_tokens": n}        → {"replies": [text]}                     (llama.cpp)
    {"model": path, "batches": [n], "prompt_tokens": p, "new_tokens": n, "threads": t}
                                                                → {"speed": [{batch, prefill, decode}]}, tokens a second
    {"model": path, "runs": [[batch, prompt, new]], "repeats": n}
                                                                → {"seconds": [[seconds, n times]]}       (vLLM)
    {"codes": [largest]}                                        → {"wrong": [share of INT8 products]}     (vLLM)

The first two may be asked of vLLM at once, with `"compiled": true` for the mode that it takes by default and a mapping
`options` of further arguments. An engine that cannot load the model answers {"error": its message}.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / ".engines"
RUNNERS = {"vllm": "vllm_runner.py", "llama": "llama_runner.py"}


def python_of(engine: str) -> Path:
    """The interpreter of an engine's environment."""
    return FOLDER / engine / "bin" / "python"


def installed(engine: str) -> bool:
    """Whether `make engines` has made the engine's environment."""
    return python_of(engine).is_file()


def ask(engine: str, request: dict[str, Any], timeout: float = 1800) -> dict[str, Any]:
    """What an engine answers to a request (see above).

    Raises:
        RuntimeError: the runner failed; with the end of what it said.
    """
    runner = Path(__file__).parent / RUNNERS[engine]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        question.write_text(json.dumps(request, default=str), encoding="utf-8")
        done = subprocess.run(
            [str(python_of(engine)), str(runner), str(question), str(answer)],
            capture_output=True, text=True, timeout=timeout, env=environment, check=False,
        )  # fmt: skip
        if done.returncode or not answer.is_file():
            raise RuntimeError(f"{engine} ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
        answered: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return answered
