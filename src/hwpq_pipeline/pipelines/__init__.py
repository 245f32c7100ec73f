"""One folder a pipeline: `nodes.py` unpacks parameters and calls a room, `pipeline.py` wires the nodes."""
