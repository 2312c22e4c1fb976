"""One example of each sub-command, for the end of its help and for the man page."""

from __future__ import annotations

from collections.abc import Mapping

EXAMPLES: Mapping[str, str] = {
    "serve": "serve --config /etc/vfiouser-oob/config.toml",
    "keep": "keep -- vfiouser-oob serve --config config.toml",
    "check-config": "check-config /etc/vfiouser-oob/config.toml",
    "status": "status --json",
    "migrations": "migrations --json",
    "metrics": "metrics",
    "support-bundle": "support-bundle",
    "migrate-check": "migrate-check vm0",
    "add": "add nvme1.toml",
    "remove": "remove nvme1",
    "reload": "reload",
    "drain": "drain nvme1",
    "disconnect": "disconnect nvme1",
    "log-level": "log-level debug --function nvme1",
    "snippet": "snippet qemu nvme0 --config /etc/vfiouser-oob/config.toml",
    "libvirt-hook": "libvirt-hook vm0 migrate begin - < domain.xml",
    "bind": "bind 0000:3b:00.2",
    "unbind": "unbind 0000:3b:00.2",
    "simulate-soc": "simulate-soc --socket-dir soc --agent-listen unix:///run/a.sock",
    "agent-check": "agent-check --agent msgpack-rpc:unix:///run/a.sock,function=f0",
    "conformance": "conformance --socket /run/vfio-user/f0.sock --safe",
    "demo": "demo --functions 2",
    "bench": "bench --against /run/vfio-user/f0.sock",
    "install-files": "install-files --root / --dry-run",
}
