"""MLflow: one run a variant and content."""
