"""How much memory a process holds, held at most and may hold.

On a CPU it is the resident set of the process (Linux lets its peak begin anew), on a GPU what
torch's allocator reserved.
"""

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch


def available_memory(device: torch.device) -> int:
    """Bytes this process may hold in all: what is free, and what it holds already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    limits = [_cgroup_limit()]
    try:
        limits.append(_from_proc("/proc/meminfo", "MemAvailable") + held_memory(device))
    except (OSError, KeyError):  # no Linux
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits)


def _cgroup_limit() -> int:
    """The least limit that a container or scheduler sets, of either version of cgroups."""
    places, limits = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")], [sys.maxsize]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return sys.maxsize
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds in ("", "memory"):
            own = places[bool(kinds)] / path.lstrip("/")
            places += [own, *own.parents]
    for place in places:
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                limits.append(int((place / name).read_text()))
            except (OSError, ValueError):  # not there, or "max"
                continue
    return min(limits)


def return_freed() -> None:
    """Let the resident set be what is in use: else a second step hides in what the first freed."""
    with suppress(AttributeError, OSError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def begin_peak(device: torch.device) -> None:
    """Let what `peak_memory` says begin anew from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # no Linux: then the peak is that since the process began
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set begins anew


def peak_memory(device: torch.device) -> int:
    """The most bytes that were held since `begin_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        return _from_proc("/proc/self/status", "VmHWM")
    except (OSError, KeyError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def held_memory(device: torch.device) -> int:
    """The bytes held."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    try:
        return _from_proc("/proc/self/status", "VmRSS")
    except (OSError, KeyError):
        return peak_memory(device)


def _from_proc(file: str, name: str) -> int:
    """A line such as `VmHWM:  1234 kB`, in bytes."""
    lines = dict(line.split(":", 1) for line in Path(file).read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
