"""A vfio-user client: what a VMM is to a server, for the upstream backend, the demo, the benchmarks and the
tests.

Anybody else may use it too (docs/howto/use-the-client.md). The names below stay; what is only in the modules may change
with any version.
"""

from vfiouser_oob.client.calls import PendingCall, Reply
from vfiouser_oob.client.client import Client, ClientIoFds, ClientRegion
from vfiouser_oob.client.connecting import ClientOptions
from vfiouser_oob.client.dma import DmaServer, NoMemory
from vfiouser_oob.client.errors import BadReply, ServerGone, TooLate
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.client.mapping import MappedRegion
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.constants import DeviceState, DmaMapFlags, IrqIndex, RegionFlags, RegionIndex
from vfiouser_protocol.errors import DmaFault, RemoteProtocolError, ReplyError, VfioUserError
from vfiouser_protocol.messages import RegionWrite

#: The region that is config space.
CONFIG = RegionIndex.CONFIG

__all__ = [
    "CONFIG",
    "BadReply",
    "Client",
    "ClientIoFds",
    "ClientMemory",
    "ClientOptions",
    "ClientRegion",
    "DeviceState",
    "DmaFault",
    "DmaMapFlags",
    "DmaServer",
    "IrqIndex",
    "MappedRegion",
    "NoMemory",
    "OwnedFd",
    "PendingCall",
    "RegionFlags",
    "RegionIndex",
    "RegionWrite",
    "RemoteProtocolError",
    "Reply",
    "ReplyError",
    "ServerGone",
    "TooLate",
    "VfioUserError",
]
