"""Measurements outside the pipelines: each writes a result file under `results/`."""
