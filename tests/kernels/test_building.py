"""The cache of compiled kernels, with a source of one line: what killed builds leave, cut files, no right to write."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.kernels import building
from hwpq_pipeline.kernels.building import is_finished, load_compiled
from tests.kernels.packed import needs_compiler

FLAGS = ("-O0",)
SCRIPT = """
import sys
from pathlib import Path
from hwpq_pipeline.kernels.building import load_compiled
print(load_compiled("tiny", Path(sys.argv[1]), ("-O0",), where="the tiny kernel"))
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that compiles in a moment, and an empty cache; its text is this test's own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    file = tmp_path / "tiny.cpp"
    file.write_text(f'extern "C" int answer() {{ return 42; }}  // {tmp_path}')
    return file


def load(source: Path) -> Path:
    return load_compiled("tiny", source, FLAGS, where="the tiny kernel")


def in_a_process(source: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(source)], stdout=subprocess.PIPE, text=True)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its time of change and its size."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


@needs_compiler
def test_a_finished_build_is_loaded_without_writing(source: Path) -> None:
    library = load(source)
    assert is_finished(library)
    assert ctypes.CDLL(str(library)).answer() == 42
    assert sorted(path.name for path in library.parent.iterdir()) == ["build.lock", "tiny.so", "tiny.so.sha256"]
    before = contents(library.parent.parent)
    if os.geteuid():  # root writes all the same
        library.parent.chmod(0o500)
    try:
        done = in_a_process(source)
        assert (done.communicate()[0].strip(), done.returncode) == (str(library), 0)
    finally:
        library.parent.chmod(0o700)
    assert contents(library.parent.parent) == before


@needs_compiler
def test_what_a_killed_build_leaves_stops_nobody(source: Path) -> None:
    """The process dies with our lock held, in the middle of torch's build, whose own lock stays."""
    killed = in_a_process(source)
    cache, deadline = source.parent / "cache", time.monotonic() + 60
    while not list(cache.glob("*/build-*/lock")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert list(cache.glob("*/build-*/lock")), "it was not killed while it compiled"
    library = load(source)
    assert is_finished(library)
    assert not list(cache.glob("*/build-*"))


@needs_compiler
def test_a_library_that_was_cut_is_compiled_again(source: Path) -> None:
    done = in_a_process(source)
    library = Path(done.communicate()[0].strip())
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    assert not is_finished(library)
    assert load(source) == library
    assert is_finished(library)
    assert ctypes.CDLL(str(library)).answer() == 42


@needs_compiler
def test_two_processes_at_once_make_one_build(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, compiler = source.parent / "calls", source.parent / "g++"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nsleep 1\nexec /usr/bin/env g++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    both = [in_a_process(source), in_a_process(source)]
    said = {process.communicate()[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(said) == 1
    assert is_finished(Path(said.pop().strip()))
    assert sum(f" -c {source} " in call for call in calls.read_text().splitlines()) == 1


def test_a_build_that_does_not_end_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "PATIENCE", 0.1)
    digest = building._digest(source, FLAGS)
    lock = source.parent / "cache" / f"tiny_{digest}" / "build.lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock), pytest.raises(HwpqError, match=f"another process compiles it and holds {lock}. Wait for"):
        load(source)


@needs_compiler
@pytest.mark.parametrize(
    ("compiler", "text", "said"),
    [
        ("/bin/false", "", r"it does not compile \(Command .*/bin/false.* returned non-zero exit status 1\)\. Install"),
        ("/nowhere/g++", "", r"it does not compile \(.*/nowhere/g\+\+: not found\)\. Install g\+\+ and ninja"),
        ("g++", "int x = y;", r"it does not compile \(.*tiny.cpp:1:9: error: .y. was not declared in this scope\)\. I"),
    ],
)
def test_the_compilers_first_complaint_is_told(
    source: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, text: str, said: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    source.write_text(text + source.read_text())
    for _ in range(2):  # torch would not compile a second time
        with pytest.raises(HwpqError, match=f"^the tiny kernel: {said}"):
            load(source)


def test_a_cache_that_cannot_be_written_is_told_with_its_variable(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(source / "below a file"))
    with pytest.raises(HwpqError, match=r"cannot be used.*Let TORCH_EXTENSIONS_DIR name a folder that you may write"):
        load(source)
