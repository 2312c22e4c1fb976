"""Parts that need a package which is not always installed, and the command that installs it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping

#: What has to be importable for an extra, by the extra's name; each with the package that has it.
EXTRAS: Mapping[str, Mapping[str, str]] = {
    "grpc": {"grpc": "grpcio", "google.protobuf": "protobuf", "grpc_reflection": "grpcio-reflection"},
    "demo": {"trustme": "trustme"},
}
#: The extra that a kind of agent needs, where there is one.
KIND_EXTRAS: Mapping[str, str] = {"grpc": "grpc"}


def missing(extra: str) -> str | None:
    """What an extra lacks here, and how to install it; None if it is all there.

    Args:
        extra: its name in pyproject.toml.
    """
    lacking = [package for module, package in EXTRAS[extra].items() if not _is_there(module)]
    if not lacking:
        return None
    verb = "is" if len(lacking) == 1 else "are"
    return f"{' and '.join(lacking)} {verb} not installed; install with: {install_command(extra)}"


def install_command(extra: str) -> str:
    """The command that installs an extra into the environment that runs."""
    return f"{sys.executable} -m pip install 'vfiouser-oob[{extra}]'"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is not there
        return False
