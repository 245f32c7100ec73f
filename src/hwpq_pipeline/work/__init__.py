"""What a stage has finished before it ends, who is at it, and what its result depends on."""
