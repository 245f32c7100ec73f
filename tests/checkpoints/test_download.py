from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from hwpq_pipeline.checkpoints.download import fetch_wheel_member
from hwpq_pipeline.errors import HwpqError

CONTENT = b"weights" * 1000
MEMBER = "demo/data.bin"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def make_wheel(directory: Path) -> Path:
    """A minimal wheel that pip accepts."""
    directory.mkdir(parents=True, exist_ok=True)
    wheel = directory / "hwpq_demo-1.0-py3-none-any.whl"
    info = "hwpq_demo-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: hwpq-demo\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def leftovers(cache: Path) -> list[Path]:
    return list(cache.rglob("*")) if cache.exists() else []


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index of one wheel that pip alone sees: a directory, no network."""
    wheel = make_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return wheel


def test_downloads_once(tmp_path: Path, index: Path) -> None:
    cache = tmp_path / "cache"
    first = fetch_wheel_member("hwpq-demo==1.0", MEMBER, SHA256, cache)
    assert first.read_bytes() == CONTENT
    index.unlink()  # nothing left to download from
    assert fetch_wheel_member("hwpq-demo==1.0", MEMBER, SHA256, cache) == first
    assert [path.name for path in leftovers(cache)] == [SHA256, "data.bin"]


def test_a_damaged_cache_is_fetched_again(tmp_path: Path, index: Path) -> None:
    first = fetch_wheel_member("hwpq-demo==1.0", MEMBER, SHA256, tmp_path / "cache")
    first.write_bytes(b"damaged")
    assert fetch_wheel_member("hwpq-demo==1.0", MEMBER, SHA256, tmp_path / "cache").read_bytes() == CONTENT


def test_wrong_sha256_names_both_and_leaves_nothing(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    wrong = "0" * 64
    with pytest.raises(HwpqError, match=f"expected {wrong}, found {SHA256}"):
        fetch_wheel_member(str(wheel), MEMBER, wrong, tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize("requirement", ["hwpq-demo==2.0", "no-such-thing==1"])
def test_missing_requirement_is_one_line(tmp_path: Path, index: Path, requirement: str) -> None:
    with pytest.raises(HwpqError, match=requirement) as caught:
        fetch_wheel_member(requirement, MEMBER, SHA256, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path / "cache") == []


def test_options_are_no_requirements(tmp_path: Path) -> None:
    with pytest.raises(HwpqError, match="option"):
        fetch_wheel_member("--index-url=somewhere", MEMBER, SHA256, tmp_path / "cache")


def test_missing_member_and_damaged_wheel(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    with pytest.raises(HwpqError, match="no member demo/other"):
        fetch_wheel_member(str(wheel), "demo/other", SHA256, tmp_path / "cache")
    wheel.write_bytes(wheel.read_bytes()[:200])
    with pytest.raises(HwpqError, match="damaged"):
        fetch_wheel_member(str(wheel), MEMBER, SHA256, tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []
