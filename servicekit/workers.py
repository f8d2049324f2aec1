"""Several processes of one server that share its port by SO_REUSEPORT, and one that minds them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import FrameType

from servicekit.settings import split_address
from servicekit.telemetry.logs import EventLogger
from servicekit.telemetry.metrics import serve_metrics

log = EventLogger(__name__)

WORKER_VARIABLE = "CREDITMESH_WORKER"
RESTART_SECONDS = 1.0


def is_worker() -> bool:
    return WORKER_VARIABLE in os.environ


def run_workers(command: Sequence[str], *, workers: int, metrics_listen: str) -> int:
    """Runs `workers` copies of `command`, restarts those that die, stops them all on SIGTERM. Returns the exit code."""
    stopping = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with tempfile.TemporaryDirectory(prefix="creditmesh-metrics-") as folder:
        environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": folder}
        processes = [_start(command, environ, number) for number in range(workers)]
        if metrics_listen:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
            serve_metrics(split_address(metrics_listen))
        while not stopping:
            time.sleep(0.1)
            for number, process in enumerate(processes):
                code = process.poll()
                if code == 2:  # the configuration is wrong; starting again changes nothing
                    stopping = True
                elif code is not None and not stopping:
                    log.warning("worker_died", worker=number, code=code)
                    time.sleep(RESTART_SECONDS)
                    processes[number] = _start(command, environ, number)
        for process in processes:
            process.send_signal(signal.SIGTERM)
        return max(abs(process.wait()) for process in processes)


def _start(command: Sequence[str], environ: dict[str, str], number: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, *command], env={**environ, WORKER_VARIABLE: str(number)}
    )
