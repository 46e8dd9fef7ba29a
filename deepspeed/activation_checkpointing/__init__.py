"""Recompute layers in backward instead of saving what is inside them: `checkpointing` is the public module.

Read in this order: checkpointing.py (what users call), stores.py (where the saved inputs stay until backward),
boundaries.py (what else happens at the edges of a checkpoint), random.py (streams of random numbers).
"""

from deepspeed.activation_checkpointing import checkpointing

__all__ = ["checkpointing"]
