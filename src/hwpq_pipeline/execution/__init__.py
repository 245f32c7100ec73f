"""Where a run's work is done: in this process, or by the workers of a Dask cluster."""
