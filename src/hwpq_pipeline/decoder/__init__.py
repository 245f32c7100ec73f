"""The dense decoder at work: loaded, run a block at a time, and what its layers are fed summed up."""
