"""Some hundred damaged files of every kind: a result or one line, within the limits. `make test-damage` has 10,000."""

from __future__ import annotations

from tests.damage import damaged
from tests.damaged_files import BYTES, SHARES, run


def test_damage_is_the_same_for_the_same_seed() -> None:
    data = bytes(range(256)) * 4
    assert damaged(data, 7) == damaged(data, 7)
    assert len({damaged(data, seed) for seed in range(50)}) > 40


def test_a_damaged_file_is_read_or_refused_in_a_line() -> None:
    found = run(1_000_000, {kind: max(1, count // 40) for kind, count in SHARES.items()})
    assert found["wrong"] == []
    assert found["memory_grew_bytes"] < BYTES
    assert all(counts.get("refused") for counts in found["counts"].values())
