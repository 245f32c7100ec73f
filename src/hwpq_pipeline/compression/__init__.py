"""The mathematics: tensors in, tensors out.  No files, no frameworks.

`contribution` prices the removal of a weight; `ewma` (running threshold) and `structured` (2:4) turn prices into
keep-masks, which `bits` packs; `recovery` finds the best remaining weights, `rounding` puts them on a grid: `grids`
has the grids, `codes` the arithmetic.
"""
