"""Activation statistics: what the dense model's layers are fed, summed over the calibration tokens."""
