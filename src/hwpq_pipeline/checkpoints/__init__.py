"""Reading and writing Hugging Face checkpoints: fetching, the layer map, a tensor at a time."""
