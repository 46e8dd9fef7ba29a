"""Reading and writing files in the background, where scripts look for it."""

from deepspeed.common.lazy import lazy_names

__getattr__ = lazy_names(__name__, {"AsyncIOBuilder": "deepspeed.offload.aio"})
