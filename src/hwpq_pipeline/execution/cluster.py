"""Work on a Dask cluster.

Without an address there is a cluster of this machine's own: worker processes with one thread of Dask each, among which
the cores are shared. With one, the scheduler there says what workers there are. They must have this code (a worker with
another version is refused, since its numbers might differ) and see the same files under the same paths.

No more calls are given out than `AHEAD` for each worker, so a cluster that grows or shrinks is used as it is. Dask has
the call of a lost worker done by another one. If the scheduler is lost, the run ends in one line. What was finished
lies in `data/.work`, and the same command goes on from there. Workers' log records reach this process's log.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any, TypeVar

import cloudpickle
import dask
import torch
from dask.system import CPU_COUNT
from distributed import Client, Future, KilledWorker, LocalCluster
from distributed.comm.core import CommClosedError

from hwpq_pipeline.errors import HwpqError, said
from hwpq_pipeline.execution.carrying import Carrier, forget_files
from hwpq_pipeline.inert import masked
from hwpq_pipeline.work.content import code_version

T = TypeVar("T")
R = TypeVar("R")
#: Calls for each worker that are given out at a time: one at work, and one that waits.
AHEAD = 2
#: Seconds in which a scheduler must answer, and a process of this machine's own cluster, which may have other work.
PATIENCE, SLOW = 20, 180

logger = logging.getLogger(__name__)


class Dask:
    """The workers of a cluster, which is connected to, or started, when the first work is given out.

    Args:
        address: of a scheduler; None for a cluster of this machine's own.
        workers: processes of that; one for each core by default.
        files: where files travel by, for workers that do not see this disk (`execution.carrying`); None if they do.
    """

    def __init__(self, address: str | None, workers: int | None, files: str | None = None) -> None:
        self.address, self.wanted, self.files = address, workers or CPU_COUNT, files
        self._open = ExitStack()

    @property
    def shares_disk(self) -> bool:
        """Whether workers see this process's files."""
        return self.files is None

    @cached_property
    def carrier(self) -> Carrier | None:
        """What brings files to workers and back, where they do not see this disk."""
        if self.files is None:
            return None
        carrier = Carrier(self.files)
        self._open.callback(carrier.close)
        return carrier

    @cached_property
    def client(self) -> Client:
        """The connection.

        Raises:
            HwpqError: no scheduler answers at the address.
        """
        if self.address is None:
            client = Client(self._open.enter_context(_own_cluster(self.wanted)))
        else:
            client = _connected(self.address)
        self._open.enter_context(client)
        client.forward_logging("hwpq_pipeline", level=logging.INFO)
        workers = len(client.scheduler_info(n_workers=-1)["workers"])
        logger.info("Dask: %d workers at %s.", workers, client.scheduler_info()["address"])
        return client

    def close(self) -> None:
        """End the connection, and the machine's own cluster; workers that stay forget the run's files."""
        if "client" in self.__dict__ and self.carrier is not None and self.client.status == "running":
            self.client.run(forget_files, self.carrier.address)
        self._open.close()
        for name in ("client", "carrier"):
            self.__dict__.pop(name, None)

    @property
    def workers(self) -> int:
        """How many there are now; at least one is waited for."""
        return max(1, len(self.client.scheduler_info(n_workers=-1)["workers"]))

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """As `Engine.map`; where one call fails, those that wait are called off.

        Raises:
            HwpqError: the scheduler or too many workers are lost, or a worker has another version of the code.
        """
        left, out = iter(items), deque[Future[Any]]()
        carrier = self.carrier
        task: Any = function if carrier is None else carrier.packed(function)
        try:
            while True:
                wanted = AHEAD * self.workers - len(out)
                for item in islice(left, max(0, wanted)):
                    out.append(self.client.submit(_call, code_version(), task, item, pure=False))
                if not out:
                    return
                result = self._result(out.popleft())
                if carrier is not None:
                    carrier.collect()
                yield result
        finally:
            for future in out:
                future.cancel(reason="the run has ended")

    def _result(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except (CancelledError, CommClosedError, TimeoutError) as error:
            raise HwpqError(
                f"the scheduler is lost ({said(error)})",
                where="execution: dask",
                remedy="Start it again, and run the same command: it goes on from what is finished.",
            ) from error
        except KilledWorker as error:
            raise HwpqError(
                f"one part of the work ended {error.allowed_failures + 1} workers; they may lack memory",
                where="execution: dask",
                remedy="Give workers more memory, or take fewer of them on a machine. Run the same command again.",
            ) from error


def _call(version: str, function: Callable[[T], R] | bytes, item: T) -> R:
    """On a worker: the function's result, if the worker has the same code."""
    if code_version() != version:
        raise HwpqError(
            f"a worker on {os.uname().nodename} has another version of the code or of what computes",
            where="execution: dask",
            remedy="Install the same commit and the same requirements.lock there.",
        )
    made: Callable[[T], R] = _unpacked(function) if isinstance(function, bytes) else function
    with torch.inference_mode():
        return made(item)


@lru_cache(maxsize=1)
def _unpacked(function: bytes) -> Any:
    return cloudpickle.loads(function)


def _connected(address: str) -> Client:
    try:
        return Client(address, timeout=PATIENCE)
    except (OSError, ValueError) as error:
        raise HwpqError(
            f"no scheduler answers ({said(error)})",
            where=f"execution.address: {masked(address)}",
            remedy="Start one (`dask scheduler`), or correct the address.",
        ) from error


def _own_cluster(workers: int) -> LocalCluster:
    threads = max(1, CPU_COUNT // workers)
    environment = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
    dask.config.set({"distributed.comm.timeouts.connect": f"{SLOW}s"})
    return LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        env=environment,
        memory_limit=0,  # Dask's own limit would end a worker in the middle of a large layer
        dashboard_address=":0",  # any port: two runs at once would ask for one
        silence_logs=logging.ERROR,
    )
