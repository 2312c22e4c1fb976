"""A configuration in a few lines for people, and what they may not have meant."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from vfiouser_oob.config.p2p import p2p_offer
from vfiouser_oob.config.schema import (
    DaemonConfig,
    DmaMode,
    FunctionConfig,
    KernelVfioDevice,
    ModelDevice,
    UpstreamDevice,
    VmConfig,
)
from vfiouser_oob.config.tables import keys
from vfiouser_oob.config.values import FILE


def summary(config: DaemonConfig) -> list[str]:
    """What the configuration says, line by line."""
    count = len(config.functions)
    source = f"{config.source}: " if config.source else ""
    lines = [
        f"{source}good, {count} function{'s' if count != 1 else ''}",
        f"control socket {config.control_socket or 'none'}",
        *([] if config.metrics_socket is None else [f"metrics socket {config.metrics_socket}"]),
        f"state directory {config.state_directory or 'none'}",
        f"reply budget {config.reply_budget_s:g} s",
        f"log level {config.log_level.value}, format {config.log_format.value}",
    ]
    lines += [_function_line(function) for function in config.functions]
    lines += [_vm_line(vm) for vm in config.vms]
    return lines


def _vm_line(vm: VmConfig) -> str:
    where = ", ".join(f"{what} {path}" for what, path in vm.sockets.items())
    return f"  VM {vm.name}: {', '.join(vm.functions)} by {vm.carrier} ({where})"


def _function_line(function: FunctionConfig) -> str:
    where = f"fd {function.fd}" if function.fd is not None else str(function.socket or "socket from systemd")
    access = f"mode {function.socket_mode:04o}"
    if function.socket_group is not None:
        access += f", group {function.socket_group}"
    if function.allow_uids is not None:
        access += f", only uids {', '.join(map(str, function.allow_uids))}"
    dma = ", dma by messages" if function.dma is DmaMode.MESSAGES else ""
    agent = f", migrated by {function.agent.describe()}, {_p2p(function)}" if function.agent is not None else ""
    return f"  {function.name}: {function.device.describe()} on {where} ({access}{dma}{agent})"


def _p2p(function: FunctionConfig) -> str:
    offered, reason = p2p_offer(function)
    return f"{'with' if offered else 'without'} P2P states: {reason}"


def warnings(config: DaemonConfig) -> list[str]:
    """What is allowed but may surprise, one line each, as things stand on this machine now."""
    found = [_of_budget(config)] if config.reply_budget_s > keys(DaemonConfig)["reply_budget_s"].default else []
    if config.state_directory is not None:
        found += _of_state_directory(config.state_directory)
    for function in config.functions:
        found += [f"function {function.name!r}: {text}" for text in _of_function(function)]
    for vm in config.vms:
        found += [f"VM {vm.name!r}: {text}" for text in _of_vm(vm, config)]
    return found


def _of_vm(vm: VmConfig, config: DaemonConfig) -> Iterator[str]:
    for name in vm.functions:
        function = config.function(name)
        if function is not None and function.agent is None:
            yield f"function {name!r} has no agent, so the VM cannot be migrated"
    for directory in dict.fromkeys(path.parent for path in vm.sockets.values()):
        if not directory.is_dir():
            yield f"the sockets' directory {directory} does not exist yet"
    if vm.socket_mode & stat.S_IWOTH and vm.allow_uids is None:
        yield f"socket_mode {vm.socket_mode:04o} lets every user of this machine pretend to be its QEMU"


def _of_budget(config: DaemonConfig) -> str:
    return (
        f"reply_budget_s is {config.reply_budget_s:g}: stock QEMU gives up after 5 s unless its device "
        "has the x-msg-timeout that `vfiouser-oob snippet qemu` prints"
    )


def _of_state_directory(path: Path) -> Iterator[str]:
    """The directory is made when it is needed, in the nearest one that there is."""
    place = next((parent for parent in (path, *path.parents) if os.access(parent, os.F_OK)), Path("/"))
    if not place.is_dir():
        yield f"state_directory {path} cannot be used: {place} is not a directory"
    elif not os.access(place, os.W_OK | os.X_OK):
        yield f"state_directory {path}: this user cannot write in {place}; what agents can do is then not remembered"


def _of_function(function: FunctionConfig) -> Iterator[str]:
    if function.socket is None and function.fd is None:
        yield "no socket is configured: it must come from systemd under this name"
    elif function.socket is not None and not function.socket.parent.is_dir():
        yield f"the socket's directory {function.socket.parent} does not exist yet"
    if function.socket_mode & stat.S_IWOTH and function.allow_uids is None:
        yield f"socket_mode {function.socket_mode:04o} lets every user of this machine connect"
    if isinstance(function.device, UpstreamDevice):
        yield from _of_upstream(function.device.socket)
    elif isinstance(function.device, KernelVfioDevice):
        yield from _of_kernel_vfio(function.device)
    else:
        yield from _of_model(function.device)


def _of_upstream(socket: Path) -> Iterator[str]:
    if not socket.is_socket():
        yield f"no vfio-user server's socket is at {socket} yet; clients are refused until there is"


def _of_kernel_vfio(device: KernelVfioDevice) -> Iterator[str]:
    if device.bdf is not None:
        node = Path("/sys/bus/pci/devices") / device.bdf
        if not node.is_dir():
            yield f"this machine has no PCI function {device.bdf} now"
        elif not (node / "driver").exists() or "vfio" not in (node / "driver").resolve().name:
            yield f"{device.bdf} is not bound to vfio-pci yet: bind it with `vfiouser-oob bind {device.bdf}`"
    elif not (Path("/sys/bus/mdev/devices") / device.name).is_dir():
        yield f"this machine has no mediated device {device.name} now: write its UUID to `create` of one of the types"


def _of_model(device: ModelDevice) -> Iterator[str]:
    for one in keys(type(device.options)).values() if device.options is not None else ():
        path = getattr(device.options, one.name)
        if one.value is FILE and path is not None and not path.is_file():
            yield f"{one.name} {path} does not exist yet"
