"""`python -m vmbed.shell SOCKET`: a Linux guest in stock QEMU that uses a function, with a shell on its console."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vmbed.assets import Assets, bootable, locate
from vmbed.errors import BedError
from vmbed.qemu import KERNEL_ARGUMENTS, QemuConfig, VfioUserDevice, machine

__all__ = ["command", "main"]


def command(assets: Assets, socket: Path) -> list[str]:
    """What to run.

    Args:
        assets: where QEMU, kernel and initramfs are.
        socket: where the daemon serves the function.

    Returns:
        Words of the command; the console is the terminal, and Ctrl-C goes to the guest.
    """
    argv = machine(assets, QemuConfig([VfioUserDevice(socket)], cpus=1))
    argv += ["-no-reboot", "-kernel", str(bootable(assets.kernel)), "-initrd", str(assets.initramfs)]
    argv += ["-append", f"{KERNEL_ARGUMENTS} vmbed.shell"]
    return [*argv, "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Become QEMU; returns only if that cannot be done.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(prog="make guest", description="boot a Linux guest that uses a function")
    parser.add_argument("socket", type=Path, help="the function's socket: make guest SOCKET=/tmp/nvme0.sock")
    options = parser.parse_args(arguments)
    if not options.socket.is_socket():
        sys.stderr.write(f"make guest: {options.socket} is no socket; is `vfiouser-oob serve` running?\n")
        return 1
    try:
        assets = locate()
        argv = command(assets, options.socket.absolute())
        sys.stderr.write("make guest: Linux boots in a few seconds\n")
        os.execve(argv[0], argv, {**os.environ, **assets.qemu_environment})
    except (BedError, OSError) as error:
        sys.stderr.write(f"make guest: {error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
