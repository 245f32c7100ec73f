"""Damage to files, the same for the same seed: flipped bits, cut ends, holes, repeats, swapped pieces, odd bytes."""

from __future__ import annotations

import random

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
    """The data after one to four damages."""
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
