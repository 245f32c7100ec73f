"""Writing what users deploy: one module a format, and the model card that goes with it."""
