"""What people look at: the comparison, charts, quality gates, and one self-contained page."""
