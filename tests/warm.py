"""`kedro` from a process that has imported the libraries already, for tests that start it many times.

Python, torch, pandas and Kedro take some seven seconds to start, and a test of DVC starts ten stages. Here a server
imports the libraries once. A small `kedro`, first in PATH, hands it the arguments, the folder, the environment and the
three streams. The server forks, and the fork runs Kedro's own entry point on the project's own code, which the server
never imports. What this does not show is the start itself: the end-to-end tests start `kedro` as users do.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "kedro.framework.cli.cli", "kedro.framework.session", "kedro.framework.startup", "kedro_datasets.pandas",
    "matplotlib.pyplot", "mlflow", "numba", "pandas", "pandera.pandas", "pyarrow.parquet", "torch", "transformers",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip

CLIENT = """#!{python} -SE
import array, json, os, socket, sys
request = json.dumps({{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    answer = server.recv(1)
sys.exit(answer[0] if answer else 1)
"""


@functools.cache
def folder_of_kedro() -> Path:
    """A folder with the small `kedro` in it. The server starts with the first call, and ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    client = folder / "kedro"
    client.write_text(CLIENT.format(python=sys.executable, address=str(folder / "socket")))
    client.chmod(0o755)
    # In the project's folder: Kedro looks for `conf/logging.yml` while it is imported.
    server = subprocess.Popen([sys.executable, __file__, str(folder / "socket")], cwd=ROOT, stdout=subprocess.PIPE)
    atexit.register(server.kill)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    return folder


def serve(address: str) -> NoReturn:
    """Import the libraries, then run every command that comes in a process of its own."""
    for name in LIBRARIES:
        importlib.import_module(name)
    assert "hwpq_pipeline" not in sys.modules
    gc.freeze()  # a fork's collections leave the shared pages alone
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)  # noqa: T201
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                answer(connection)
            connection.close()


def answer(connection: socket.socket) -> NoReturn:
    """Run one command in a fork, and send its exit status."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        more = connection.recv(1 << 16)
        if not more:
            os._exit(1)
        request += more
    child = os.fork()
    if child == 0:
        connection.close()
        run_kedro(**json.loads(request), streams=streams)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if select.select([connection], [], [], 0.02)[0]:  # it says nothing more, so it has ended: a test's time is up
            os.kill(child, signal.SIGKILL)
    connection.sendall(bytes([os.waitstatus_to_exitcode(ended[1]) % 256]))
    os._exit(0)


def run_kedro(arguments: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> NoReturn:
    """Become `kedro` with these arguments, there."""
    for stream, descriptor in enumerate(streams):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    own = str(Path(__file__).parent)
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*filter(None, paths), *(path for path in sys.path if path != own)]
    importlib.invalidate_caches()
    sys.argv = ["kedro", *arguments]
    status = 1
    try:
        from kedro.framework.cli import main

        main()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
    except BaseException:  # noqa: BLE001 (a process's end: shown, and told by the status)
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
