"""Ours beside llm-compressor (`python -m benchmarks.peers`)."""
