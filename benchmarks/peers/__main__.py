"""`python -m benchmarks.peers`: the contest."""

from benchmarks.peers.contest import main

main()
