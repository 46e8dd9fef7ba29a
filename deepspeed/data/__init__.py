"""Feeding data: each rank its part, each epoch in a new order."""

from deepspeed.data.loader import DeepSpeedDataLoader
from deepspeed.data.repeating import RepeatingLoader

__all__ = ["DeepSpeedDataLoader", "RepeatingLoader"]
