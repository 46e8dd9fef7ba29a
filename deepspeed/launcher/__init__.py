"""The `deepspeed` command: start a script on every rank of this machine."""
