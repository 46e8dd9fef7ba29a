"""Memory of this process, facts about this machine, and the record a rank leaves."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class Memory:
    """Peak resident memory: over the life of the process, and since `restart`.

    Read from VmHWM where Linux has it: getrusage would include the memory of the process that forked us.
    """

    def __init__(self) -> None:
        self._before = 0

    def restart(self) -> None:
        """Forget the peak so far, where the system allows; otherwise `peak` is the peak of the whole life."""
        self._before = self.life_peak()
        try:
            _CLEAR.write_text("5")
        except OSError:
            self._before = 0

    def peak(self) -> int:
        """Bytes at the peak since the last `restart`."""
        return _high_water()

    def life_peak(self) -> int:
        """Bytes at the peak since the process started."""
        return max(self._before, _high_water())


def resident() -> int:
    """Bytes resident now: data, shared memory and mapped files."""
    return _from_status("VmRSS")


def data_resident() -> int:
    """Bytes of data resident now, shared memory included, mapped files not."""
    return _from_status("RssAnon") + _from_status("RssShmem")


def resident_kinds() -> dict[str, int]:
    """Bytes resident now, by kind: own data, mapped files, shared memory."""
    return {name: _from_status(name) for name in ("RssAnon", "RssFile", "RssShmem")}


def disk_traffic() -> int:
    """Bytes this process has read from and written to disks; 0 where the system does not count."""
    counts = dict(line.split(": ") for line in _lines(Path("/proc/self/io")))
    return sum(int(counts.get(name, 0)) for name in ("read_bytes", "write_bytes"))


def _from_status(name: str) -> int:
    """Read a size in bytes from what Linux says about this process."""
    for line in _lines(_STATUS):
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS}: expected a line {name}; this measurement needs Linux")


def _high_water() -> int:
    if _STATUS.exists():
        return _from_status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_record(out: Path, rank: int, record: dict[str, Any]) -> None:
    """Leave what a rank measured; it appears whole or not at all."""
    partial = out / f"rank{rank}.partial"
    partial.write_text(json.dumps(record))
    partial.rename(out / f"rank{rank}.json")


def machine() -> dict[str, str | int | float]:
    """Describe processor, cores, memory, load and software."""
    names = [
        line.partition(":")[2].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(pages * size / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
