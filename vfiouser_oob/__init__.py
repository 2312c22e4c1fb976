"""vfiouser-oob: a vfio-user server daemon that hosts out-of-band live migration."""

from vfiouser_oob._version import __version__

__all__ = ["__version__"]
