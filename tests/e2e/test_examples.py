"""Clients of other languages, as examples/ shows them, against a running mesh."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mesh import ROOT, Mesh

EXAMPLES = ROOT / "examples"


@pytest.fixture
def user(mesh: Mesh) -> str:
    mesh.credit("alice", 10**9)
    return "alice"


def run(*command: str, folder: Path, seconds: float = 170) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def check(mesh: Mesh, told: str, calls: int) -> None:
    assert "built-in LOCAL model" in told
    assert told.count("charged") >= 1
    mesh.wait_for_rest()
    assert len([entry for entry in mesh.transactions("alice") if entry.call_id]) == calls
    assert mesh.findings() == []


def test_python(mesh: Mesh, user: str) -> None:
    before = len([entry for entry in mesh.transactions("alice") if entry.call_id])
    told = run(sys.executable, "sync_client.py", mesh.llm_address, user, folder=EXAMPLES / "python")
    assert "reason: MODEL_NOT_FOUND" in told
    assert '"city"' in told
    assert run(sys.executable, "async_client.py", mesh.llm_address, user, folder=EXAMPLES / "python").count("charged") == 2
    check(mesh, told, before + 4)


@pytest.mark.skipif(shutil.which("npm") is None, reason="there is no Node here; the example needs it, the mesh does not")
def test_node(mesh: Mesh, user: str, tmp_path: Path) -> None:
    before = len([entry for entry in mesh.transactions("alice") if entry.call_id])
    folder = tmp_path / "examples" / "node"
    shutil.copytree(EXAMPLES / "node", folder, ignore=shutil.ignore_patterns("node_modules"))
    (tmp_path / "protos").symlink_to(ROOT / "protos")
    run("npm", "install", "--no-audit", "--no-fund", "--loglevel=error", folder=folder)
    told = run("node", "client.js", mesh.llm_address, user, folder=folder)
    assert "state: CALL_STATE_SETTLED attempts: 1" in told
    assert "refused: NOT_FOUND" in told
    check(mesh, told, before + 2)


@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("go") is None, reason="there is no Go here; the example needs it, the mesh does not")
def test_go(mesh: Mesh, user: str, tmp_path: Path) -> None:
    before = len([entry for entry in mesh.transactions("alice") if entry.call_id])
    folder = tmp_path / "examples" / "go"
    shutil.copytree(EXAMPLES / "go", folder, ignore=shutil.ignore_patterns("gen", ".bin"))
    for name in ("protos", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    if not (ROOT / ".venv").exists():
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run("bash", "generate.sh", folder=folder, seconds=380)
    told = run("go", "run", ".", mesh.llm_address, user, folder=folder, seconds=380)
    assert "state: CALL_STATE_SETTLED attempts: 1" in told
    assert "refused: NotFound" in told
    check(mesh, told, before + 2)
