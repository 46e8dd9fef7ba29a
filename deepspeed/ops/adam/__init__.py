"""Adam and AdamW as one fused pass: `FusedAdam`, and `DeepSpeedCPUAdam` under the original's arguments."""

from deepspeed.ops.adam.compiled import path_in_use
from deepspeed.ops.adam.optimizer import DeepSpeedCPUAdam, FusedAdam

__all__ = ["DeepSpeedCPUAdam", "FusedAdam", "path_in_use"]
