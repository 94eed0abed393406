"""How long contenders take, how much memory, and on what machine."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("heddle-attention", "numpy", "torch", "jax", "jaxlib", "triton", "transformers")


@dataclass(frozen=True)
class Timing:
    """The seconds each repetition took, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third: half of the repetitions lie between them."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


def interleave(
    steps: Mapping[str, Callable[[int], object]],
    repeats: int,
    warm_up: int = 1,
    lead_in: bool = False,
    tell: Callable[[str], object] = lambda message: None,
) -> dict[str, Timing]:
    """Run the steps round by round, each once a round, so that a noisy minute falls on all of them alike.

    Args:
        steps: by name; each is called with the number of the round (to choose its inputs) and returns when its work is
            done, not only queued.
        repeats: rounds that count.
        warm_up: rounds before those.
        lead_in: run each step once more right before its time is taken, with other inputs. The threads of the one
            before, of another framework perhaps, spin a while for more work, and its memory has just been given back.
        tell: is told what runs now.

    Raises:
        ValueError: fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for round_ in range(-warm_up, repeats):
        shift = round_ % len(names)  # no step always follows the same one
        for name in names[shift:] + names[:shift]:
            tell(f"round {round_ + 1} of {repeats}: {name}" if round_ >= 0 else f"warming up: {name}")
            if lead_in:
                steps[name](round_ - 1)
            began = time.perf_counter()
            steps[name](round_)
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def memory_reader(size: int) -> Callable[[int], object]:
    """A step for :func:`interleave` that reads ``size`` bytes of memory once, all cores together.

    A dot product: NumPy's sums and maxima are bound by their arithmetic, not by the memory.
    """
    parts = np.array_split(np.ones(size // 4, np.float32), cores())
    pool = ThreadPoolExecutor(cores())
    return lambda _: list(pool.map(lambda part: np.dot(part, part), parts))


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory(step: Callable[[], object]) -> int:
    """The most resident memory of this process, in bytes, while ``step`` runs, above what it holds before.

    A first run, not measured, compiles and loads code. What it leaves free in the C allocator goes back to the system,
    so that the second starts from the inputs and the code alone. Run it in a fresh process: what earlier work left free
    could be taken again without a trace.

    Raises:
        NotImplementedError: not on Linux, whose high-water mark of a process can be reset.
    """
    _check_linux()
    step()
    give_back()
    before = reset_peak()
    step()
    return max(0, peak() - before)


def give_back() -> None:
    """Hand memory that is free but held by this process, by Python's or C's allocator, back to the system."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def reset_peak() -> int:
    """Forget how much memory of this process was resident at most, for :func:`peak`; returns how much is, in bytes.

    Raises:
        NotImplementedError: not on Linux, as of :func:`peak_memory`.
    """
    _check_linux()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return _status("VmRSS")


def peak() -> int:
    """The most resident memory of this process since :func:`reset_peak`, in bytes."""
    return _status("VmHWM")


def _check_linux() -> None:
    if sys.platform != "linux":
        raise NotImplementedError(f"peak memory is measured on Linux only, this is {sys.platform}")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, memory, versions, the time (UTC)."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerators": _accelerators(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _accelerators() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
