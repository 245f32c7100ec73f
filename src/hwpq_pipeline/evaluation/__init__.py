"""What an export is worth: quality beside the dense model, bytes on disk, sparsity, charts."""
