"""What the benchmarks share: runs taken in turns, ratios with their spread, peak memory, the machine."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hf_minitron.hardware import describe_hardware, versions

Times = dict[str, float]  # seconds by clock


def time_in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, list[Times]]:
    """Times of every run, one after the other, ``repeats`` times over; every second turn goes backwards.

    What else the machine does then falls on all of them, and the ratio within a turn says more than the times.
    """
    times: dict[str, list[Times]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(time_run(runs[name], device))
    return times


def time_run(run: Callable[[], Any], device: str = "cpu") -> Times:
    """Seconds of one run by each clock.

    On CPU ``wall`` and ``cpu``: the latter, summed over threads, leaves out the waiting for other jobs. On CUDA only
    ``wall``, between two events on the stream.
    """
    if device != "cuda":
        start = time.perf_counter(), time.process_time()
        run()
        return {"wall": time.perf_counter() - start[0], "cpu": time.process_time() - start[1]}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return {"wall": begin.elapsed_time(end) / 1000}


def medians(times: Sequence[Times]) -> Times:
    """The median of each clock's seconds."""
    return {clock: median(turn[clock] for turn in times) for clock in times[0]}


def spreads(times: Sequence[Times], baseline: Sequence[Times]) -> dict[str, dict[str, float]]:
    """By clock, median, least and greatest of the ratios, turn by turn."""
    found = {}
    for clock in times[0]:
        ratios = [one[clock] / other[clock] for one, other in zip(times, baseline, strict=True)]
        found[clock] = {"median": median(ratios), "min": min(ratios), "max": max(ratios)}
    return found


def show_spread(ratio: Mapping[str, float]) -> str:
    """``0.81 (0.79–0.84)``: the median and the range."""
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"


def peak_growth(run: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes by which the peak memory grows in ``run``: on CUDA what is allocated, else the process's resident memory.

    On CPU only the first run of a process can be measured: call it in a fresh one, once the inputs are there.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = _peak_resident()
    run()
    return _peak_resident() - before


def run_afresh(script: str, *words: str) -> dict[str, Any]:
    """The JSON that ``script`` prints last when it is run with ``words`` in a new process."""
    done = subprocess.run([sys.executable, script, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def describe_machine() -> dict[str, Any]:
    """Hardware, threads and versions, for the record."""
    wanted = ("python", "torch", "transformers")
    found = {name: number for name, number in versions().items() if name in wanted}
    return {**describe_hardware(), "threads": torch.get_num_threads(), "versions": found}


def _peak_resident() -> int:
    """Bytes. ``ru_maxrss`` is the fallback: on Linux a child starts with its parent's, in KiB; macOS counts bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
