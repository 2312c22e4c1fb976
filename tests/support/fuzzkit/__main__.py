"""Fuzz one target with atheris: `python -m fuzzkit TARGET [libFuzzer's options, directories or files]`."""

import sys

import atheris

with atheris.instrument_imports(include=["vfiouser_protocol", "vfiouser_agents", "vfiouser_oob"]):
    from fuzzkit.targets import TARGETS

name = sys.argv.pop(1)
atheris.Setup(sys.argv, TARGETS[name])
atheris.Fuzz()
