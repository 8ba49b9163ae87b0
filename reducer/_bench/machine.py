"""What the kernel says of processes and cores (Linux, /proc).

The kernel keeps each process' highest resident size (VmHWM) and sets it back to the present size
when a 5 is written to /proc/PID/clear_refs, so a peak is exact and needs no sampling.
"""

from __future__ import annotations

import os
from pathlib import Path


def reset_peak(pid: int | str = "self") -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def resident_bytes(pid: int | str = "self") -> int:
    return _status_bytes(pid, "VmRSS")


def peak_bytes(pid: int | str = "self") -> int:
    """Highest resident size since reset_peak()."""
    return _status_bytes(pid, "VmHWM")


def cpu_seconds() -> tuple[float, float]:
    """Seconds that this machine's cores were busy, and in all, since boot (/proc/stat)."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]
    ticks = os.sysconf("SC_CLK_TCK")
    return (sum(fields) - idle) / ticks, sum(fields) / ticks


def _status_bytes(pid: int | str, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no {field}: the process has ended")
