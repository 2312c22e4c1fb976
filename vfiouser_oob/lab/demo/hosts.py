"""Two hosts, each with a simulated SoC and a daemon, on one shared backing store: where migrations take place."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from vfiouser_agents.rpc.kinds import DEFAULT_KIND
from vfiouser_oob.lab.demo.certificates import Certificates, make_certificates
from vfiouser_oob.lab.demo.children import Child, running
from vfiouser_oob.lab.demo.progress import Progress

HOSTS = ("A", "B")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOptions:
    """What the hosts have.

    Args:
        size: bytes of each namespace.
        functions: how many functions.
        doorbells: "trapped" or "polled".
        state_size: bytes of device memory that each function carries.
        state_churn: bytes of it that change per second; None: the simulator's default.
        tls: whether daemons and agents talk TLS, each with a certificate.
        agents: what the agents of the hosts speak, and so the kinds of the daemons' adapters.
        migration: more lines for the `migration` tables of the daemons' configurations.
    """

    size: int = 64 << 20
    functions: int = 1
    doorbells: str = "polled"
    state_size: int = 0
    state_churn: int | None = None
    tls: bool = True
    agents: tuple[str, str] = (DEFAULT_KIND, DEFAULT_KIND)
    migration: str = ""

    @property
    def names(self) -> list[str]:
        """The functions' names."""
        return [f"f{number}" for number in range(self.functions)]


@dataclass(frozen=True, slots=True)
class HostPair:
    """Both hosts, running.

    Args:
        directory: where everything is.
        children: all processes that were started.
        agents: the addresses of the agents, by host.
    """

    directory: Path
    children: Sequence[Child]
    agents: Mapping[str, str]

    def socket(self, host: str, name: str) -> Path:
        """Where a host's daemon serves a function."""
        return self.directory / host / f"{name}.sock"

    def daemon(self, host: str) -> Child:
        """A host's daemon."""
        return next(child for child in self.children if child.name == f"serve-{host}")

    def agent_port(self, host: str) -> int:
        """The TCP port of a host's agent."""
        return int(self.agents[host].rpartition(":")[2])


@asynccontextmanager
async def two_hosts(directory: Path, options: HostOptions, progress: Progress) -> AsyncIterator[HostPair]:
    """Run both hosts in the block.

    Args:
        directory: an empty one with a short path.
        options: what the hosts have.
        progress: takes one line per step.

    Raises:
        ChildFailed: a process did not start.
        CertificatesUnavailable: they cannot be made.
    """
    certificates = make_certificates(directory / "tls") if options.tls else None
    _make_images(directory, options)
    children: list[Child] = []
    agents: dict[str, str] = {}
    async with AsyncExitStack() as stack:
        for host, kind in zip(HOSTS, options.agents, strict=True):
            place = directory / host
            place.mkdir()
            simulator = await stack.enter_async_context(
                running(f"simulate-soc-{host}", _simulator(directory, place, options, kind, certificates), directory)
            )
            address = json.loads((place / "soc" / "agent.json").read_text(encoding="utf-8"))["addresses"][0]
            agents[host] = address
            config = place / "daemon.toml"
            config.write_text(_configuration(place, options, kind, address, certificates), encoding="utf-8")
            serve = ["serve", "--config", str(config)]
            daemon = await stack.enter_async_context(running(f"serve-{host}", serve, directory))
            children += [simulator, daemon]
            progress(
                f"host {host}: simulator is ready, pid {simulator.pid}; agent at {address}; "
                f"daemon is ready, pid {daemon.pid}"
            )
        yield HostPair(directory, children, agents)


def _make_images(directory: Path, options: HostOptions) -> None:
    base = _image(directory)
    images = (
        [base] if options.functions == 1 else [base.with_name(f"{base.name}.{n}") for n in range(options.functions)]
    )
    for image in images:
        with image.open("wb") as file:
            file.truncate(options.size)


def _image(directory: Path) -> Path:
    return directory / "disk.img"


def _simulator(
    directory: Path, place: Path, options: HostOptions, kind: str, certificates: Certificates | None
) -> list[str]:
    arguments = [
        "simulate-soc",
        f"--socket-dir={place / 'soc'}",
        f"--functions={options.functions}",
        f"--image={_image(directory)}",
        "--shared-image",
        f"--doorbells={options.doorbells}",
        f"--state-size={options.state_size}",
        f"--agent-protocol={kind}",
    ]
    if options.state_churn is not None:
        arguments.append(f"--state-churn={options.state_churn}")
    if certificates is not None:
        arguments += [
            "--agent-listen=tls://127.0.0.1:0",
            f"--tls-cert={certificates.agent.cert}",
            f"--tls-ca={certificates.authority}",
        ]
    return arguments


def _configuration(
    place: Path, options: HostOptions, kind: str, address: str, certificates: Certificates | None
) -> str:
    more = ""
    if certificates is not None:
        more = f', tls = {{ ca = "{certificates.authority}", cert = "{certificates.daemon.cert}" }}'
    lines = ["[daemon]", f'control_socket = "{place / "control.sock"}"']
    for name in options.names:
        # The protocol of the 2022 example has no names, so the adapter is told what to call its only device.
        device = f', device = "{name}"' if kind == "legacy-tcp" else ""
        lines += [
            "[[function]]",
            f'name = "{name}"',
            f'socket = "{place / f"{name}.sock"}"',
            f'device = {{ kind = "vfio-user", socket = "{place / "soc" / f"{name}.sock"}" }}',
            f'agent = {{ kind = "{kind}", address = "{address}", function = "{name}"{device}{more} }}',
        ]
        if options.migration:
            lines.append(f"migration = {{ {options.migration} }}")
    return "\n".join(lines) + "\n"
