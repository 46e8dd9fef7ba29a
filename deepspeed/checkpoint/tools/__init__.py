"""``ds_ckpt``: a command about checkpoints, a file for each thing that it does. Read `finding` first."""
