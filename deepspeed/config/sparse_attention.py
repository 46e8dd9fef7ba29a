"""``sparse_attention``: block-sparse patterns."""

from typing import Literal

from deepspeed.config.base import Count, Integer, Section, key


class SparseAttentionSection(Section):
    """Sparse attention patterns."""

    mode: Literal["dense", "fixed", "variable", "bigbird", "bslongformer"] = key("fixed", "pattern")
    block: Count = key(16, "block size")
    different_layout_per_head: bool = key(False, "a pattern per head")
    num_local_blocks: Count = key(4, "blocks of a local window")
    num_global_blocks: Count = key(1, "global blocks per window")
    attention: Literal["bidirectional", "unidirectional"] = key("bidirectional", "direction")
    horizontal_global_attention: bool = key(False, "global blocks attend to everything")
    num_different_global_patterns: Count = key(1, "global patterns")
    num_random_blocks: Integer = key(0, "random blocks per row")
    local_window_blocks: list[Integer] = key([4], "blocks of each window")
    global_block_indices: list[Integer] = key([0], "first global blocks")
    global_block_end_indices: list[Integer] | None = key(None, "last global blocks")
    num_sliding_window_blocks: Count = key(3, "blocks of the sliding window")
