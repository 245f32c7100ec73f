"""What the tasks of the contest are; read by both sides, so without either side's libraries."""

from __future__ import annotations

#: Bits of a code, where a task rounds to integers.
BITS = {"int4": 4, "int3": 3, "int2": 2, "2of4-int4": 4}
#: Columns that share a scale: 576 columns do not divide by 128.
GROUP = 64
