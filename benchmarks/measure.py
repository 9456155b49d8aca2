"""How benchmarks measure: candidates take turns, ratios within a turn, peaks of memory."""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from qvgpt.memory import begin_peak, held_memory, peak_memory, return_freed


def interleaved(
    steps: Mapping[str, Callable[[], Any]], blocks: int, warmup: int = 2, own_clock: bool = False
) -> dict[str, list[float]]:
    """Seconds of each candidate's step in each block; the order turns from block to block.

    With `own_clock` a step returns the seconds of it that count.
    """
    for step in steps.values():
        for _ in range(warmup):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for block in range(blocks):
        turn = block % len(names)
        for name in names[turn:] + names[:turn]:
            synchronize()
            started = time.perf_counter()
            counted = steps[name]()
            synchronize()
            whole = time.perf_counter() - started
            seconds[name].append(counted if own_clock else whole)
    return seconds


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, Any]:
    """Median over the blocks of over ÷ under, with its 95 % bootstrap interval."""
    ratios = np.asarray(over) / np.asarray(under)
    drawn = np.random.default_rng(0).choice(ratios, size=(4000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return {"median": float(np.median(ratios)), "ci95": [float(low), float(high)]}


def device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def extra_peak(step: Callable[[], Any]) -> int:
    """Bytes that a step needs for a while on top of what is there before it and after it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    here = torch.device("cpu")
    return_freed()
    before = held_memory(here)
    begin_peak(here)
    step()
    return peak_memory(here) - before


MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""What docs/scaling.md advises on a CPU: glibc keeps what is freed for the next step."""


def in_process(script: str, advised: bool = True, **job: Any) -> Any:
    """What `script --worker JOB` prints, as JSON: memory and threads start afresh there."""
    command = [sys.executable, script, "--worker", json.dumps(job)]
    env = {**os.environ, **(MALLOC if advised else {})}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def matmul_peak(dtype: torch.dtype, size: int = 2048, seconds: float = 3.0) -> float:
    """Floating-point operations a second of a square matrix product, at its best."""
    a, b = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        synchronize()
        started = time.perf_counter()
        a @ b
        synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
