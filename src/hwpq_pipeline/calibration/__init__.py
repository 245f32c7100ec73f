"""From a text corpus to token samples, and from token samples to activation statistics."""
