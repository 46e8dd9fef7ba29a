"""The version, as in the distribution's metadata."""

__version__ = "1.0.0.dev0"
