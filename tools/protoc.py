"""Makes the descriptor of the gRPC adapter's messages out of the published .proto, with grpcio-tools."""

from __future__ import annotations

import base64
import sys
import tempfile
import textwrap
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[1]
PROTO_ROOT = ROOT / "agents/vfiouser_agents/adapters/proto"
PROTO = "oob_migration/v1/oob_migration.proto"
TARGET = ROOT / "agents/vfiouser_agents/adapters/grpc_descriptor.py"
_HEAD = '''"""The compiled form of proto/oob_migration/v1/oob_migration.proto; `make proto` writes this file."""

from __future__ import annotations

import base64

#: A `google.protobuf.FileDescriptorProto`.
FILE = base64.b64decode(
'''


def generate() -> str:
    """Compile the .proto.

    Returns:
        The text of the module that holds it.

    Raises:
        SystemExit: protoc reports an error.
    """
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    with tempfile.TemporaryDirectory() as directory, resources.as_file(resources.files("grpc_tools")) as tools:
        output = Path(directory, "set.binpb")
        paths = [f"--proto_path={PROTO_ROOT}", f"--proto_path={tools / '_proto'}"]
        if protoc.main(["protoc", *paths, f"--descriptor_set_out={output}", PROTO]):
            raise SystemExit("protoc failed")
        [file] = FileDescriptorSet.FromString(output.read_bytes()).file
    text = base64.b64encode(file.SerializeToString(deterministic=True)).decode()
    lines = "".join(f'    "{line}"\n' for line in textwrap.wrap(text, 110))
    return f"{_HEAD}{lines})\n"


def main() -> None:
    """Write the module, or with --check say whether it is up to date."""
    text = generate()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text)
    elif TARGET.read_text() != text:
        raise SystemExit(f"{TARGET.relative_to(ROOT)} is not what {PROTO} says; run `make proto`")


if __name__ == "__main__":
    main()
