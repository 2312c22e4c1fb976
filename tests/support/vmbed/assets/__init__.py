"""The files that the VM tests need: stock QEMU, a Debian kernel and an initramfs.

`python -m vmbed.assets --cache DIR` builds them from the machine's own Debian archive; `locate` finds them.
Standard library only.
"""

from __future__ import annotations

from vmbed.assets.errors import AssetError
from vmbed.assets.store import Assets, bootable, default_cache, locate

__all__ = ["AssetError", "Assets", "bootable", "default_cache", "locate"]
