"""Builders that scripts look for here; nothing is compiled."""

from deepspeed.common.lazy import lazy_names

__getattr__ = lazy_names(__name__, {"AsyncIOBuilder": "deepspeed.offload.aio"})
