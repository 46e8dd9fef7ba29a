"""The version by the name some tools read."""

from deepspeed.version import __version__ as version

__all__ = ["version"]
