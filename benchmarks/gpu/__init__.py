"""Compression and inference on a GPU, beside the card's own ceilings and the rivals: `python -m benchmarks.gpu`.

One call, no network, under ten minutes; needs torch ≥ 2.11, Triton, numpy and safetensors, and no numba, Kedro or
MLflow. Shapes are LLaMA-2's, 7B and 70B; weights are random, energies and correlations of the inputs are made up.

Each section runs in a process of its own with a time limit, and every row is written as soon as it is there: what
fails is a row with its message, and takes nothing else with it, not even by an illegal access or a hang.
`--dry-run` takes tiny shapes on the CPU, the kernels under Triton's interpreter: it shows that all of it runs, and its
times mean nothing.
"""
