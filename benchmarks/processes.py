"""Processes as a benchmark sees them: CPU seconds, memory, cores."""

from __future__ import annotations

import os

import psutil

MIB = 1024**2


def cpu_seconds(pid: int | None = None) -> float:
    """User and system seconds of a process and of every descendant that still runs."""
    root = psutil.Process(pid or os.getpid())
    total = 0.0
    for process in (root, *root.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def trunk_processes(pid: int | None = None) -> list[psutil.Process]:
    """The trunk daemons among a process's descendants."""
    children = psutil.Process(pid or os.getpid()).children(recursive=True)
    return [child for child in children if "trunk_service" in " ".join(child.cmdline())]


def pin(cores: list[int], pid: int | None = None) -> None:
    """Lets a process (all of its threads) run on these cores alone."""
    for thread in psutil.Process(pid or os.getpid()).threads():
        os.sched_setaffinity(thread.id, cores)
