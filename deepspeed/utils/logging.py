"""The logger under the path scripts import it from."""

from deepspeed.common.logging import log_dist, logger
from deepspeed.common.logging import set_log_level as set_log_level_from_string
from deepspeed.common.logging import warn_once as warning_once

__all__ = ["log_dist", "logger", "set_log_level_from_string", "warning_once"]
