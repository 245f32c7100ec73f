"""Real servers for tests, on a free port, gone when the block ends."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

#: Who runs PostgreSQL where tests run as root, which it refuses: the user of Debian's packages.
POSTGRES_USER = "postgres"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def mlflow_server(store: str, folder: Path, *, port: int | None = None, patience: float = 120) -> Iterator[str]:
    """A running `mlflow server`; its address.

    Args:
        store: its backend, a database's address.
        folder: for its artifacts and its log.
        port: to listen on; a free one by default.
        patience: seconds that it may take to answer.
    """
    port = port or free_port()
    command = (
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--artifacts-destination",
        str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    )  # fmt: skip
    with serving(command, port, folder / "server.log", health="/health", patience=patience) as address:
        yield address


@contextmanager
def served_model(model: Path, folder: Path, *, patience: float = 120) -> Iterator[str]:
    """A running `mlflow models serve` of a model's directory, in this environment; its address."""
    port = free_port()
    command = (
        sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(model), "--env-manager", "local",
        "--host", "127.0.0.1", "--port", str(port),
    )  # fmt: skip
    with serving(command, port, folder / "server.log", health="/health", patience=patience) as address:
        yield address


@contextmanager
def serving(command: Sequence[str], port: int, log: Path, *, health: str = "/", patience: float = 120) -> Iterator[str]:
    """A running server of HTTP; its address.

    Args:
        command: that starts it.
        port: that it is told to listen on.
        log: for what it prints.
        health: what it answers once it is there.
        patience: seconds that it may take.
    """
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    address = f"http://127.0.0.1:{port}"
    with log.open("ab") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            _wait(address + health, server, log, patience)
            yield address
        finally:
            _end(server, signal.SIGTERM)


def _end(server: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """End a process and its children: asked first, then made to."""
    for attempt in (how, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, attempt)
        try:
            server.wait(15)
            return
        except subprocess.TimeoutExpired:
            continue


def _wait(address: str, server: subprocess.Popen[bytes], log: Path, patience: float) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:  # noqa: S310 - our own address
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"no answer in {patience} s\n{log.read_text()[-3000:]}")


def postgres_missing() -> str:
    """Why no PostgreSQL can be started here; empty where it can."""
    if find_spec("psycopg") is None:
        return "psycopg is not installed: pip install -e '.[postgres]'"
    if _postgres_program("initdb") is None:
        return "PostgreSQL is not installed: apt install postgresql"
    if os.geteuid() == 0 and POSTGRES_USER not in {user.pw_name for user in pwd.getpwall()}:
        return f"PostgreSQL does not run as root, and there is no user {POSTGRES_USER}"
    return ""


def _postgres_program(name: str) -> str | None:
    """Debian keeps the server's programs out of the path, a folder a version."""
    versions = Path("/usr/lib/postgresql").glob(f"*/bin/{name}")
    newest = max(versions, key=lambda file: int(file.parts[-3]), default=None)
    return str(newest) if newest else shutil.which(name)


@contextmanager
def postgres(patience: float = 60) -> Iterator[str]:
    """An empty PostgreSQL of its own in a folder that goes with it; the address of its database.

    Args:
        patience: seconds that it may take to answer.
    """
    import psycopg

    # Not pytest's folder: others may not enter it.
    with tempfile.TemporaryDirectory(prefix="hwpq-postgres-", ignore_cleanup_errors=True) as name:
        owner: dict[str, Any] = {}
        if os.geteuid() == 0:
            owner = {"user": POSTGRES_USER, "group": POSTGRES_USER, "extra_groups": []}
            shutil.chown(name, POSTGRES_USER, POSTGRES_USER)
        data, port, log = Path(name) / "data", free_port(), Path(name) / "log"
        initdb, server_program = _postgres_program("initdb"), _postgres_program("postgres")
        assert initdb, postgres_missing()
        assert server_program, postgres_missing()
        subprocess.run(
            (initdb, "--pgdata", data, "--username", "mlflow", "--auth", "trust", "--no-sync"),
            cwd=name, check=True, stdout=subprocess.DEVNULL, **owner,
        )  # fmt: skip
        command = (
            server_program, "-D", data, "-p", str(port), "-k", name, "-c", "listen_addresses=127.0.0.1",
            "-c", "fsync=off",
        )  # fmt: skip
        with log.open("ab") as output:
            server = subprocess.Popen(command, cwd=name, stdout=output, stderr=output, start_new_session=True, **owner)
            try:
                end = time.monotonic() + patience
                while True:
                    try:
                        psycopg.connect(host="127.0.0.1", port=port, user="mlflow", dbname="postgres").close()
                        break
                    except psycopg.OperationalError:
                        if server.poll() is not None or time.monotonic() > end:
                            raise AssertionError(log.read_text()[-3000:]) from None
                        time.sleep(0.2)
                yield f"postgresql://mlflow@127.0.0.1:{port}/postgres"
            finally:
                _end(server, signal.SIGINT)  # it ends its connections, then itself
