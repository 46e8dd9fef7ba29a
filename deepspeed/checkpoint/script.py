"""The script beside checkpoints that writes their whole weights."""

from __future__ import annotations

import os
from pathlib import Path

SCRIPT = "zero_to_fp32.py"
TEXT = '''\
#!/usr/bin/env python
"""Write the whole fp32 weights of a checkpoint: python zero_to_fp32.py . OUTPUT_DIR (--help tells more)."""

from deepspeed.utils.zero_to_fp32 import main

if __name__ == "__main__":
    main()
'''


def write_script(save_dir: Path) -> None:
    """Put the script beside the checkpoints of a folder."""
    path, aside = save_dir / SCRIPT, save_dir / f".{SCRIPT}.partial"
    if path.is_file() and path.read_bytes() == TEXT.encode():
        return
    aside.write_text(TEXT)
    aside.chmod(0o755)
    os.replace(aside, path)
