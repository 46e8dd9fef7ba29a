"""The parts of the GPT example: each file is one noun, `pretrain_gpt.py` puts them together."""
