"""MLflow: one run for each variant and content."""
