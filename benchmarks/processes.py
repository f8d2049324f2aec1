"""Processes under measurement: what CPU and memory they use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def start(module: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=subprocess.PIPE)


def load(kind: str, target: str, **options: Any) -> dict[str, Any]:
    """Runs the load generator in its own process and gives its figures."""
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load", "--kind", kind, "--target", target, *arguments], cwd=ROOT,
        capture_output=True, text=True, check=True,
    )
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def descendants(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += descendants(int(child))
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its descendants, those that ended included."""
    total = 0.0
    for each in descendants(pid):
        try:
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            continue
        total += sum(map(int, fields[11:15])) / TICKS
    return total


def rss_megabytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 2**20


def rss_of_all(pid: int) -> float:
    return sum(rss_megabytes(each) for each in descendants(pid))


@dataclass
class Cpu:
    """CPU by process over a stretch of work."""

    pids: dict[str, int]

    def __post_init__(self) -> None:
        self._before = {name: cpu_seconds(pid) for name, pid in self.pids.items()}

    def milliseconds_per(self, count: int) -> dict[str, float]:
        return {
            name: round(1000 * (cpu_seconds(pid) - self._before[name]) / max(1, count), 4)
            for name, pid in self.pids.items()
        }
