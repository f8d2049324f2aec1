"""Other gateways before the same stand-in, with the same load: python -m benchmarks --only peers, PEERS=FOLDER

FOLDER/v is a virtual environment with `litellm[proxy]`, FOLDER/node_modules has `@portkey-ai/gateway`; what is missing
is left out and said so. Their ledgers are off (they have none, or need a database for it); ours is on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.processes import cpu_seconds, load, rss_of_all
from tests.support.ports import free_port

CONCURRENCIES = (1, 16, 64)
START_SECONDS = 90.0


@contextmanager
def gateway(name: str, folder: Path, upstream_port: int) -> Iterator[tuple[int, int] | None]:
    """Its port and process; None when it is not installed or does not start."""
    port = free_port()
    environ = dict(os.environ)
    for variable in ("PYTHONPATH", "VIRTUAL_ENV"):
        environ.pop(variable, None)
    if name == "LiteLLM":
        environ |= {
            "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        }
        command = folder / "v" / "bin" / "litellm"
        config = Path(tempfile.mkdtemp()) / "config.yaml"
        config.write_text(json.dumps({
            "model_list": [{"model_name": "unary", "litellm_params": {
                "model": "openai/unary", "api_base": f"http://127.0.0.1:{upstream_port}/v1", "api_key": "sk-bench",
            }}],
            "litellm_settings": {"telemetry": False},
        }))
        arguments = [
            str(command), "--config", str(config), "--port", str(port), "--host", "127.0.0.1", "--num_workers", "2"
        ]
    else:
        command = folder / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
        arguments = ["node", str(command), f"--port={port}", "--headless"]
    if not command.exists():
        yield None
        return
    process = subprocess.Popen(
        arguments, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield (port, process.pid) if _answers(port, process) else None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    give_up_at = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up_at and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2)
            return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            time.sleep(0.3)
    return False


def measure(name: str, port: int, pid: int | None, *, seconds: float) -> tuple[str, str]:
    """Rates and latencies by concurrency; CPU per call and memory of its processes."""
    told, cpu = [], ""
    for concurrency in CONCURRENCIES:
        before = cpu_seconds(pid) if pid else 0.0
        got = load("http", f"127.0.0.1:{port}", model="unary", concurrency=concurrency, seconds=seconds)
        told.append(
            f"c={concurrency}: {got['rate']:.0f}/s, p50 {got['p50']} ms, p99 {got['p99']} ms, errors {got['errors']}"
        )
        if pid and got["calls"]:
            cpu = f"{1000 * (cpu_seconds(pid) - before) / (got['calls'] * (1 + 1 / seconds)):.2f} ms CPU a call"
    return "; ".join(told), f"{cpu}, RSS {rss_of_all(pid):.0f} MB" if pid else ""


def peers_table(upstream_port: int, *, seconds: float) -> list[tuple[str, str, str]]:
    folder = Path(os.environ.get("PEERS", "/nonexistent"))
    rows = [("the stand-in itself, HTTP", *measure("", upstream_port, None, seconds=seconds))]
    for name in ("LiteLLM", "Portkey"):
        if name == "Portkey":
            os.environ["BENCH_PORTKEY_CONFIG"] = json.dumps({
                "provider": "openai", "api_key": "sk-bench", "custom_host": f"http://127.0.0.1:{upstream_port}/v1",
            })
        with gateway(name, folder, upstream_port) as started:
            if started is None:
                rows.append((name, "not installed here, or did not start", ""))
            else:
                rows.append((f"{name}, ledger off", *measure(name, *started, seconds=seconds)))
        os.environ.pop("BENCH_PORTKEY_CONFIG", None)
    return rows
