"""`python -m vmbed.assets [--cache DIR]`: fetch and build what the VM tests need."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from vmbed.assets.builder import build, exclusive
from vmbed.assets.errors import AssetError
from vmbed.assets.libvirt import fetch_libvirt
from vmbed.assets.ownkernel import build_own_kernel
from vmbed.assets.store import CACHE_ENV, default_cache

__all__ = ["main"]


def _say(line: str) -> None:
    sys.stdout.write(f"vm-assets: {line}\n")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """Build the assets; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vm-assets", description=__doc__)
    parser.add_argument("--cache", type=Path, help=f"default: ${CACHE_ENV}, else .cache/vm in the checkout")
    parser.add_argument("--archive", help="base address of a Debian archive; default: this machine's own")
    parser.add_argument("--refresh", action="store_true", help="look for newer packages in a complete cache")
    parser.add_argument("--long", action="store_true", help="fetch what the long tests need, too")
    args = parser.parse_args(argv)
    started = time.monotonic()
    cache = (args.cache or default_cache()).resolve()
    try:
        assets = build(cache, _say, archive=args.archive, refresh=args.refresh, long=args.long)
        with exclusive(cache, _say):
            libvirt = fetch_libvirt(cache, _say, archive=args.archive, refresh=args.refresh)
            if args.long:
                build_own_kernel(cache, _say, archive=args.archive, refresh=args.refresh)
    except AssetError as error:
        sys.stderr.write(f"vm-assets: error: {error}\n")
        return 1
    took = time.monotonic() - started
    found = f"QEMU {assets.qemu_version}, Linux {assets.kernel_version}, libvirt {libvirt.version}"
    _say(f"{found} ready in {cache} ({took:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
