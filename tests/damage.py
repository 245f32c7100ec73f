"""Damage to files, the same for the same seed: to their bytes, or to the values of what is still whole JSON."""

from __future__ import annotations

import json
import random
from typing import Any

#: What breaks parsers more often than chance does.
_ODD = (
    b"\x00",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"{",
    b"}",
    b"[" * 64,
    b'"',
    b"-1",
    b"1e999",
    b"NaN",
    b"99999999999999999999",
)


def damaged(data: bytes, seed: int) -> bytes:
    """The data after one to four damages; after none for a seed below 0."""
    if seed < 0:
        return data
    chance = random.Random(seed)
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        _damage(found, chance)
    return bytes(found)


def _damage(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    # Headers stand at the beginning, and say what follows.
    at = min(at, chance.choice((16, 256, len(data))))
    kind = chance.randrange(7)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        del data[at : at + chance.randint(1, 64)]
    elif kind == 3:
        data[at:at] = chance.choice(_ODD)
    elif kind == 4:
        data[at:at] = data[at : at + chance.randint(1, 64)]
    elif kind == 5:
        data[at : at + 8] = chance.choice((b"\xff" * 8, b"\x00" * 8, (2**31).to_bytes(8, "little")))
    else:
        data[at : at + chance.randint(1, 8)] = chance.randbytes(chance.randint(1, 8))


#: What stands where something else is wanted.
_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 2**31, 2**62, 10**30, -(2**40), 0.5, 1e308, float("nan"), "", "x", "\ud800", "../x", [],
    {}, [1, 2], {"a": 1}, [[[[]]]], "a" * 5000,
)  # fmt: skip


def damaged_json(data: bytes, seed: int) -> bytes:
    """JSON with one to three of its values changed, removed or renamed, still JSON; as it is for a seed below 0."""
    if seed < 0:
        return data
    chance = random.Random(seed)
    value = json.loads(data)
    for _ in range(chance.randint(1, 3)):
        holder, key = _place(value, chance)
        kind = chance.randrange(4)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[f"{key}{chance.choice('sx_')}"] = holder.pop(key)
        elif kind == 2 and isinstance(holder[key], int):
            holder[key] = holder[key] * chance.choice((-1, 2, 3, 1000)) + chance.choice((-1, 0, 1))
        else:
            holder[key] = chance.choice(_VALUES)
        if not value:
            break
    return json.dumps(value).encode()


def _place(value: Any, chance: random.Random) -> tuple[Any, Any]:
    """A holder in the value, and a key of it; not deeper than one chance in two each time."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = chance.choice(keys)
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.3:
            return value, key
        value = inner
