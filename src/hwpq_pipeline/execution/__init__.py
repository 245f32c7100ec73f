"""Mapping the method over a model's layers, on this machine."""
