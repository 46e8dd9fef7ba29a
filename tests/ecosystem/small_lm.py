"""A tokenizer trained on a few sentences and a language model of its size: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

SENTENCES = [
    "the cat sat on the mat",
    "a dog ran over the hill",
    "the sun is warm today",
    "we read a book at night",
    "rain falls on the old roof",
    "the boat goes down the river",
    "my house has a red door",
    "birds sing in the tall tree",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Train a word tokenizer on the sentences."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<pad>", "<bos>", "<eos>"]
    words.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def language_model(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    """Make a GPT-2 of two small layers without dropout, its weights drawn from `seed`."""
    settings = {
        "vocab_size": len(tokenizer()),
        "n_positions": 32,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 1,
    }
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**{**settings, **changes}))
