"""Our own daemon passes the whole suite, strictly, with each backend that runs here, migration included."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from forkserver import fork_program
from vfiouser_conformance.cases import all_cases
from vfiouser_conformance.runner import CaseVerdict, Runner, RunOutcome
from vfiouser_conformance.select_cases import select
from vfiouser_conformance.stimulus import PROFILES
from vfiouser_conformance.trial import Target

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
START_S = 30.0
TIMEOUT_S = 5.0


@contextlib.contextmanager
def program(path: Path, *arguments: str) -> Iterator[None]:
    """Run one of our programs until the block ends; it has begun when there is a socket at the path."""
    places = [str(ROOT), str(ROOT / "protocol"), str(ROOT / "agents"), str(ROOT / "examples/device-model/src")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    with (path.parent / f"{path.name}.log").open("wb") as log:
        process = fork_program("vfiouser_oob", arguments, env=environ, stdout=log.fileno(), stderr=log.fileno())
        try:
            deadline = time.monotonic() + START_S
            while not path.is_socket():
                assert process.poll() is None, (path.parent / f"{path.name}.log").read_text()
                assert time.monotonic() < deadline, f"nothing listens on {path}"
                time.sleep(0.02)
            yield
        finally:
            process.terminate()
            process.wait(START_S)


def model(path: Path, *, retain_state: bool = False) -> contextlib.AbstractContextManager[None]:
    """The daemon with the test device."""
    config = path.parent / f"{path.name}.toml"
    config.write_text(
        f"""
        [daemon]
        control_socket = "none"
        [[function]]
        name = "f0"
        socket = "{path}"
        device = {{ kind = "model", model = "test" }}
        retain_state = {str(retain_state).lower()}
        """
    )
    return program(path, "serve", "--config", str(config))


def judge(target: Target) -> RunOutcome:
    """Run all cases strictly."""
    return Runner(target, pinned=True).run(all_cases())


#: The specification would have registers stay for the next client; ours finds nothing of the last one, unless told to.
NOTHING_LEFT = {"SESSION-011": "allowed, but not recommended: registers at the end of a connection: reset"}


def failures(outcome: RunOutcome) -> dict[str, str]:
    """What did not pass although it applies, but for what the memory of the device, all zeros, cannot show."""
    good = (CaseVerdict.PASSED, CaseVerdict.NOT_APPLICABLE)
    blank = ("REGION-INFO-014", CaseVerdict.CANNOT_TELL)
    return {
        result.case.name: result.reason
        for result in outcome.results
        if result.verdict not in good and (result.case.name, result.verdict) != blank
    }


def passed(outcome: RunOutcome, prefixes: Sequence[str]) -> dict[str, int]:
    """How many cases of areas passed."""
    names = [result.case.name for result in outcome.results if result.verdict is CaseVerdict.PASSED]
    return {prefix: sum(name.startswith(prefix) for name in names) for prefix in prefixes}


def test_a_model(tmp_path: Path) -> None:
    """The daemon with a model of its own, whose DMA and interrupts the profile `test` drives."""
    path = tmp_path / "d.sock"
    with model(path):
        outcome = judge(Target(str(path), None, TIMEOUT_S, PROFILES["test"](TIMEOUT_S)))
    assert NOTHING_LEFT == failures(outcome)
    assert {"FRAME": 29, "DMA-0": 21, "CLIENT": 12} == passed(outcome, ["FRAME", "DMA-0", "CLIENT"])


def test_the_example_of_a_model(tmp_path: Path) -> None:
    """The device of `write-a-device` fails nothing; what makes a known device do DMA does not know it."""
    path = tmp_path / "d.sock"
    device = "model:acme_device.checksum:Checksum"
    with program(path, "serve", "--socket-path", str(path), "--device", device, "--control-socket", "none"):
        outcome = judge(Target(str(path), None, TIMEOUT_S))
    assert NOTHING_LEFT == {
        result.case.name: result.reason for result in outcome.results if result.verdict is CaseVerdict.FAILED
    }
    assert passed(outcome, ["FRAME", "IRQ"])["FRAME"] == 29


def test_retained_state(tmp_path: Path) -> None:
    """With `retain_state` registers are there for the next client, as the specification recommends."""
    path = tmp_path / "d.sock"
    with model(path, retain_state=True):
        target = Target(str(path), None, TIMEOUT_S, PROFILES["test"](TIMEOUT_S))
        outcome = Runner(target, pinned=True).run(select(all_cases(), expression="SESSION-011"))
    assert {} == failures(outcome)
    assert {"SESSION": 1} == passed(outcome, ["SESSION"])


def test_an_upstream_server(tmp_path: Path) -> None:
    """The daemon in front of another vfio-user server with the same device."""
    upstream, path = tmp_path / "u.sock", tmp_path / "d.sock"
    device = f"vfio-user:{upstream}"
    arguments = ("serve", "--socket-path", str(path), "--device", device, "--control-socket", "none")
    with model(upstream), program(path, *arguments):
        outcome = judge(Target(str(path), None, TIMEOUT_S, PROFILES["test"](TIMEOUT_S)))
    assert NOTHING_LEFT == failures(outcome)
    assert {"FRAME": 29, "DMA-0": 21, "CLIENT": 12} == passed(outcome, ["FRAME", "DMA-0", "CLIENT"])


@contextlib.contextmanager
def host(directory: Path, image: Path) -> Iterator[Path]:
    """A simulated SoC and a daemon that migrates its function; yields the daemon's socket."""
    directory.mkdir()
    agent, path, config = directory / "agent.sock", directory / "d.sock", directory / "d.toml"
    config.write_text(
        f"""
        [daemon]
        control_socket = "none"
        [[function]]
        name = "f0"
        socket = "{path}"
        device = {{ kind = "vfio-user", socket = "{directory / "f0.sock"}" }}
        agent = {{ kind = "msgpack-rpc", address = "unix://{agent}", function = "f0" }}
        """
    )
    soc = ["simulate-soc", "--socket-dir", str(directory), "--image", str(image), "--shared-image"]
    with program(agent, *soc, "--agent-listen", f"unix://{agent}"), program(path, "serve", "--config", str(config)):
        yield path


def test_migration(tmp_path: Path) -> None:
    """Two daemons with NVMe functions of two SoCs: everything but DMA, and a state carried from one to the other."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    with host(tmp_path / "a", image) as source, host(tmp_path / "b", image) as destination:
        outcome = judge(Target(str(source), str(destination), TIMEOUT_S, PROFILES["nvme"](TIMEOUT_S)))
    assert NOTHING_LEFT == failures(outcome)
    found = passed(outcome, ["FEATURE", "MIGRATION", "LOGGING", "V1", "DIRTY"])
    assert all(count > 12 for count in found.values()), found


@pytest.mark.parametrize("safe", [True, False])
def test_the_device_is_left_as_it_was(tmp_path: Path, safe: bool) -> None:
    """After the cases that touch config space, and after the safe ones, it is as it was found."""
    path = tmp_path / "d.sock"
    with model(path, retain_state=True):
        target = Target(str(path), None, TIMEOUT_S)
        first = Runner(target).run(select(all_cases(), expression="REGION or WRITE-MULTI or INFO", safe=safe)).facts
        second = Runner(target).run([]).facts
    assert first.config == second.config
    assert first.regions == second.regions
