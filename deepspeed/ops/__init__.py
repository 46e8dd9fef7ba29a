"""Optimizers and numerics."""
