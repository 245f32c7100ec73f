"""A disk of the test's own under a project's `data/`, which can be filled and made read-only."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small import copy_small_project


class Disk:
    """A project whose `data/` is a small tmpfs.

    Attributes:
        project: the project.
        data: the mounted folder.
    """

    def __init__(self, project: Path, megabytes: int) -> None:
        self.project, self.data = project, project / "data"
        kept = project / "data.kept"
        self.data.rename(kept)
        self.data.mkdir()
        done = mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(self.data))
        if done.returncode:
            self.data.rmdir()
            kept.rename(self.data)
            pytest.skip(f"this process may not mount a tmpfs: {done.stderr.strip()}")
        shutil.copytree(kept, self.data, dirs_exist_ok=True, symlinks=True)
        shutil.rmtree(kept)

    def fill(self, leave: int) -> None:
        """Take all space but `leave` bytes, whole pages of them."""
        free = os.statvfs(self.data)
        with (self.data / ".filler").open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(free.f_bavail * free.f_frsize - leave, 1))

    def empty(self) -> None:
        """Give the space back."""
        (self.data / ".filler").unlink()

    def writable(self, is_so: bool) -> None:
        """Let the disk be written, or not."""
        done = mount("-o", f"remount,{'rw' if is_so else 'ro'}", str(self.data))
        assert done.returncode == 0, done.stderr

    def close(self) -> None:
        """Take the disk out."""
        subprocess.run(["umount", "--lazy", str(self.data)], check=True)


def mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`mount …`; a machine without the program is like one where it is forbidden."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount")
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def disk(small_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    """One for the tests of a module, each of which leaves it writable, with space and with the data as they were."""
    project = copy_small_project(small_project, tmp_path_factory.mktemp("disk") / "project")
    made = Disk(project, megabytes=64)
    yield made
    made.close()
