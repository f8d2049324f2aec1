"""Markers by folder, and one PostgreSQL for the whole run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Starting PostgreSQL as another user forks; gRPC's own fork handlers crash the child.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

from deploy.local.kafka import Kafka
from deploy.local.postgres import Postgres
from tests.support import ports
from tests.support.databases import Databases
from tests.support.mesh import Mesh
from tests.support.milvus import Milvus
from tests.support.upstream import Upstream

FOLDERS = ("unit", "contract", "integration", "e2e", "fault", "tidy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(root).parts[0]
        if folder in FOLDERS:
            item.add_marker(folder)


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A short path that PostgreSQL's own user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="creditmesh-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres(scratch: Path) -> Iterator[Postgres]:
    server = Postgres(scratch / "postgres", settings={"max_connections": "400"})
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def databases(postgres: Postgres) -> Databases:
    """Fresh, migrated databases out of a template."""
    return Databases(postgres)


@pytest.fixture(scope="session")
def kafka(scratch: Path) -> Iterator[Kafka]:
    """A real Apache Kafka broker for the whole run."""
    broker = Kafka(scratch / "kafka", port=ports.free_port())
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture(scope="session")
def upstream() -> Iterator[Upstream]:
    """A model server that behaves as the model's name says."""
    server = Upstream()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def milvus(tmp_path: Path) -> Iterator[Milvus]:
    """A server of Milvus' protocol of this test's own."""
    server = Milvus(tmp_path / "milvus")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def free_port() -> int:
    return ports.free_port()


@pytest.fixture
def new_mesh(databases: Databases, scratch: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Mesh]]:
    """Makes meshes of real processes, each on databases of its own; stopped at the end of the test."""
    meshes: list[Mesh] = []

    def make(**settings: str) -> Mesh:
        mesh = Mesh(databases, scratch / "logs", name=request.node.name, settings=settings)
        meshes.append(mesh)
        return mesh

    yield make
    for mesh in meshes:
        mesh.stop()


@pytest.fixture(scope="module")
def new_module_mesh(
    databases: Databases, scratch: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Mesh]]:
    """As new_mesh, for the tests of a module."""
    meshes: list[Mesh] = []

    def make(**settings: str) -> Mesh:
        mesh = Mesh(databases, scratch / "logs", name=request.module.__name__, settings=settings)
        meshes.append(mesh)
        return mesh

    yield make
    for mesh in meshes:
        mesh.stop()


@pytest.fixture(scope="module")
def mesh_of_three(new_module_mesh: Callable[..., Mesh]) -> Mesh:
    """With nothing registered: the built-in model serves all aliases, and the memory aliases by rules."""
    made = new_module_mesh()
    made.start_memory()
    return made


@pytest.fixture(scope="module")
def mesh(databases: Databases, scratch: Path, upstream: Upstream, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    """One running mesh for the tests of a module, its models registered."""
    made = Mesh(databases, scratch / "logs", name=request.module.__name__, settings={})
    made.start()
    yield made
    made.stop()
