"""One interface over torch's devices: ``get_accelerator()`` finds the machine's device on its first call."""

from deepspeed.accelerator.accelerator import Accelerator, get_accelerator, set_accelerator

__all__ = ["Accelerator", "get_accelerator", "set_accelerator"]
