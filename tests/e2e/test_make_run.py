"""The launcher behind `make run`: starts a mesh, says what is running, survives restarts, stops cleanly."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mesh import ROOT
from tests.support.ports import free_port

BIN = Path(sys.executable).parent


class Launcher:
    """`python -m deploy.local.mesh` on ports and a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.llm, self.tokenstore, self.memory = (f"127.0.0.1:{free_port()}" for _ in range(3))
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("LLM_", "TOKENSTORE_", "MEMORY_"))}
        self.environ = {
            **clean, "CREDITMESH_RUN_DIR": str(folder), "LLM_LISTEN": self.llm, "TOKENSTORE_LISTEN": self.tokenstore,
            "LLM_METRICS_LISTEN": f"127.0.0.1:{free_port()}", "TOKENSTORE_METRICS_LISTEN": f"127.0.0.1:{free_port()}",
            "LLM_LOCAL_TOKENS_PER_SECOND": "0", "PYTHONUNBUFFERED": "1", "MEMORY_LISTEN": self.memory,
            "MEMORY_METRICS_LISTEN": f"127.0.0.1:{free_port()}",
        }
        self.process: subprocess.Popen[str] | None = None
        self.lines: list[str] = []

    def start(self) -> float:
        """Seconds until the banner."""
        begun = time.monotonic()
        self.lines = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deploy.local.mesh"], cwd=ROOT, env=self.environ, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()
        while not any("creditmesh is running" in line for line in self.lines):
            assert self.process.poll() is None, "".join(self.lines)
            assert time.monotonic() - begun < 60, "".join(self.lines)
            time.sleep(0.02)
        return time.monotonic() - begun

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            self.lines.extend(process.stdout)

    def again(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "deploy.local.mesh"], cwd=ROOT, env=self.environ, capture_output=True, text=True,
            timeout=30, check=False,
        )

    def command(self, program: str, *arguments: str) -> str:
        target = {"llm-service": self.llm, "memory-worker": self.memory}.get(program, self.tokenstore)
        done = subprocess.run(
            [BIN / program, *arguments, "--target", target], capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=60)


@pytest.fixture
def launcher(scratch: Path) -> Iterator[Launcher]:
    folder = scratch / f"run-{time.monotonic_ns()}"
    made = Launcher(folder)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.stop()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_mesh_starts_says_what_runs_and_keeps_its_data(launcher: Launcher) -> None:
    launcher.start()
    assert "100 credits" in launcher.command("tokenstore-service", "credit", "alice", "100")
    assert "by LOCAL" in launcher.command("llm-service", "stream", "alice", "hello")
    assert launcher.command("memory-worker", "items", "alice") == ""
    assert "0 item" in launcher.command("memory-worker", "erase", "alice")
    second = launcher.again()
    assert second.returncode == 0
    assert "already running" in second.stdout
    assert launcher.llm in second.stdout
    assert launcher.stop() == 0
    assert "creditmesh: stopped\n" in launcher.lines
    launcher.start()
    assert "charge" in launcher.command("tokenstore-service", "transactions", "alice")
    assert "0 findings" in launcher.command("tokenstore-service", "verify")
    assert launcher.stop() == 0
    assert not any("trace" in line.lower() for line in launcher.lines), "".join(launcher.lines)


def test_a_taken_port_is_one_line_that_says_what_to_do(launcher: Launcher) -> None:
    host, _, port = launcher.llm.rpartition(":")
    with socket.socket() as taken:
        taken.bind((host, int(port)))
        taken.listen()
        done = launcher.again()
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"creditmesh: {launcher.llm} can not be listened on")
    assert "LLM_LISTEN" in line


def test_a_folder_that_can_not_be_written_is_one_line(launcher: Launcher, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    launcher.environ["CREDITMESH_RUN_DIR"] = str(file / "run")
    done = launcher.again()
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from deploy.local import mesh

    monkeypatch.setattr(mesh, "RUN", tmp_path)
    monkeypatch.setattr(mesh, "LEAST_FREE_BYTES", 2**62)
    with pytest.raises(SystemExit):
        mesh.require_space()
    assert "free some space" in capsys.readouterr().err
