"""Text: from a source to documents, and from documents to token samples."""
