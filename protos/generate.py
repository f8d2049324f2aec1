"""Regenerates gen/ from the contracts. The only way gen/ changes.

`buf/validate/validate.proto` is not copied into the repository: its descriptor comes from the installed protovalidate
and is given to protoc as a descriptor set.

    python protos/generate.py            write gen/
    python protos/generate.py IMAGE      write only IMAGE, a descriptor set with sources for buf lint and buf breaking
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import grpc_tools
from google.protobuf import descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2
from grpc_tools import protoc
from protovalidate._gen.buf.validate import validate_pb

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GEN = ROOT / "gen"


def write_known_types(path: Path) -> None:
    known = descriptor_pb2.FileDescriptorSet()
    for module in (descriptor_pb2, duration_pb2, timestamp_pb2, field_mask_pb2):
        module.DESCRIPTOR.CopyToProto(known.file.add())
    known.file.add().ParseFromString(validate_pb._DESC.proto.to_binary())
    path.write_bytes(known.SerializeToString(deterministic=True))


def run_protoc(known_types: Path, *arguments: str) -> None:
    include = Path(grpc_tools.__file__).parent / "_proto"
    command = ["protoc", f"--descriptor_set_in={known_types}", f"-I{PROTOS}", f"-I{include}"]
    if protoc.main([*command, *arguments]) != 0:
        sys.exit(1)


def main(arguments: list[str]) -> None:
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    files = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    services = [name for name in files if name.endswith("_service.proto")]
    with tempfile.TemporaryDirectory() as folder:
        known_types = Path(folder) / "known_types.binpb"
        write_known_types(known_types)
        if arguments:
            image = ["--include_imports", "--include_source_info", f"--descriptor_set_out={arguments[0]}"]
            run_protoc(known_types, *image, *files)
            return
        shutil.rmtree(GEN, ignore_errors=True)
        GEN.mkdir()
        messages = ["buf/validate/validate.proto", *files]
        run_protoc(known_types, f"--python_out={GEN}", f"--mypy_out=quiet:{GEN}", *messages)
        grpc_out = [f"--grpc_python_out={GEN}", f"--mypy_grpc_out=quiet,only_async:{GEN}"]
        run_protoc(known_types, *grpc_out, *services)
    for package in [path for path in GEN.rglob("*") if path.is_dir()]:
        (package / "__init__.py").touch()
    for package in ("creditmesh", "buf"):
        (GEN / package / "py.typed").touch()


if __name__ == "__main__":
    main(sys.argv[1:])
