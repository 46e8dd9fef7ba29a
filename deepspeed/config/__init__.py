"""The JSON contract: `load_config` turns a dict, a file or base64 into one typed, checked tree.

Read in this order: base.py (what a section is), root.py (the whole tree), loading.py (the door), then
batch.py, auto.py, rules.py and unbuilt.py.
"""

from deepspeed.config.auto import resolve_from_model, resolve_scheduler
from deepspeed.config.batch import BatchSizes
from deepspeed.config.loading import load_config, read_config
from deepspeed.config.root import DeepSpeedConfig
from deepspeed.config.unbuilt import refuse_unbuilt

__all__ = [
    "BatchSizes",
    "DeepSpeedConfig",
    "load_config",
    "read_config",
    "refuse_unbuilt",
    "resolve_from_model",
    "resolve_scheduler",
]
