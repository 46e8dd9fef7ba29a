"""The engine: forward, backward, step."""
