"""The structures that Identify returns.

Spec: NVMe 1.4, 5.15.2.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

from vfiouser_soc.nvme.config import (
    CRITICAL_TEMPERATURE_K,
    WARNING_TEMPERATURE_K,
    ControllerIdentity,
    ControllerLimits,
)
from vfiouser_soc.nvme.layout import ascii_field, pack_fields
from vfiouser_soc.nvme.namespace import Namespace
from vfiouser_soc.nvme.queues import MAX_IN_FLIGHT
from vfiouser_soc.nvme.spec import (
    BROADCAST_NSID,
    IDENTIFY_SIZE,
    VERSION_1_4,
    Cns,
    NvmeError,
    StatusCode,
)
from vfiouser_soc.nvme.state import ERROR_LOG_ENTRIES

_OAES_NAMESPACE_ATTRIBUTES = 1 << 8
_LPA_COMMANDS_SUPPORTED = 1 << 1
_LPA_EXTENDED = 1 << 2
_FRMW_ONE_READ_ONLY_SLOT = 1 << 1 | 1 << 0
#: Compare, Dataset Management, Write Zeroes, Save/Select, Timestamp, Verify.
_ONCS = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7
#: There is a volatile write cache, and Flush may name all namespaces at once.
_VWC = 0b111
_CNTRLTYPE_IO = 1
_ONE_POWER_STATE_CENTIWATTS = 2500
#: Deallocated blocks read as zeros, and Write Zeroes may deallocate.
_DLFEAT = 0b1001

_DESCRIPTOR_EUI64, _DESCRIPTOR_NGUID, _DESCRIPTOR_UUID = 1, 2, 3
_LIST_ENTRIES = 1024


class IdentifyRequest(NamedTuple):
    """The parameters of one Identify command."""

    cns: int
    nsid: int
    controller_id: int


class Identify:
    """Makes identify structures.

    Args:
        identity: the controller's names.
        limits: its sizes.
        namespaces: active namespaces by id.
    """

    def __init__(
        self, identity: ControllerIdentity, limits: ControllerLimits, namespaces: Mapping[int, Namespace]
    ) -> None:
        self._identity = identity
        self._limits = limits
        self._namespaces = namespaces
        self._builders: dict[int, Callable[[IdentifyRequest], bytes]] = {
            Cns.NAMESPACE: self._namespace,
            Cns.CONTROLLER: self._controller,
            Cns.ACTIVE_NAMESPACES: self._namespace_list,
            Cns.NAMESPACE_DESCRIPTORS: self._descriptors,
            Cns.ALLOCATED_NAMESPACES: self._namespace_list,
            Cns.ALLOCATED_NAMESPACE: self._namespace,
            Cns.NAMESPACE_CONTROLLERS: self._namespace_controllers,
            Cns.SUBSYSTEM_CONTROLLERS: self._controllers,
        }

    def structure(self, request: IdentifyRequest) -> bytes:
        """Make the structure that was asked for.

        Returns:
            4096 bytes.

        Raises:
            NvmeError: no such structure or namespace.
        """
        builder = self._builders.get(request.cns)
        if builder is None:
            raise NvmeError(StatusCode.INVALID_FIELD, f"Identify structure {request.cns:#04x}", location=40)
        return builder(request).ljust(IDENTIFY_SIZE, b"\0")

    @property
    def namespace_count(self) -> int:
        """Highest namespace id that is valid (NN)."""
        return max(self._namespaces, default=0)

    def _controller(self, request: IdentifyRequest) -> bytes:
        identity, limits = self._identity, self._limits
        capacity = sum(namespace.store.size for namespace in self._namespaces.values())
        return pack_fields(
            IDENTIFY_SIZE,
            (
                (0, "H", identity.vendor_id),
                (2, "H", identity.vendor_id),
                (4, "s", ascii_field(identity.serial, 20)),
                (24, "s", ascii_field(identity.model, 40)),
                (64, "s", ascii_field(identity.firmware, 8)),
                (72, "B", 4),  # RAB: 16 commands per burst
                (77, "B", limits.mdts),
                (78, "H", identity.controller_id),
                (80, "I", VERSION_1_4),
                (92, "I", _OAES_NAMESPACE_ATTRIBUTES),
                (111, "B", _CNTRLTYPE_IO),
                (258, "B", 3),  # ACL: aborts are carried out at once, so this is no real limit
                (259, "B", limits.event_requests - 1),
                (260, "B", _FRMW_ONE_READ_ONLY_SLOT),
                (261, "B", _LPA_COMMANDS_SUPPORTED | _LPA_EXTENDED),
                (262, "B", ERROR_LOG_ENTRIES - 1),
                (266, "H", WARNING_TEMPERATURE_K),
                (268, "H", CRITICAL_TEMPERATURE_K),
                (280, "O", capacity),
                (512, "B", 0x66),  # SQES: 64 bytes
                (513, "B", 0x44),  # CQES: 16 bytes
                (514, "H", MAX_IN_FLIGHT),
                (516, "I", self.namespace_count),
                (520, "H", _ONCS),
                (525, "B", _VWC),
                (768, "s", identity.subsystem_nqn.encode()[:223]),
                (2048, "H", _ONE_POWER_STATE_CENTIWATTS),
            ),
        )

    def _namespace(self, request: IdentifyRequest) -> bytes:
        namespace = self._namespaces.get(request.nsid)
        if namespace is None:
            self._check_nsid(request.nsid)
            return bytes(IDENTIFY_SIZE)  # a valid id of an inactive namespace
        return _identify_namespace(namespace)

    def _namespace_list(self, request: IdentifyRequest) -> bytes:
        if request.nsid >= BROADCAST_NSID - 1:
            raise NvmeError(StatusCode.INVALID_NAMESPACE, f"list after namespace {request.nsid:#x}", location=4)
        ids = sorted(nsid for nsid in self._namespaces if nsid > request.nsid)[:_LIST_ENTRIES]
        return struct.pack(f"<{len(ids)}I", *ids)

    def _descriptors(self, request: IdentifyRequest) -> bytes:
        namespace = self._namespaces.get(request.nsid)
        if namespace is None:
            self._check_nsid(request.nsid)
            raise NvmeError(StatusCode.INVALID_FIELD, f"namespace {request.nsid} is not active", location=4)
        identity = namespace.identity
        return b"".join(
            struct.pack("<BBxx", kind, len(value)) + value
            for kind, value in (
                (_DESCRIPTOR_EUI64, identity.eui64),
                (_DESCRIPTOR_NGUID, identity.nguid),
                (_DESCRIPTOR_UUID, identity.uuid.bytes),
            )
        )

    def _namespace_controllers(self, request: IdentifyRequest) -> bytes:
        if request.nsid not in self._namespaces:
            self._check_nsid(request.nsid)
            return bytes(IDENTIFY_SIZE)
        return self._controllers(request)

    def _controllers(self, request: IdentifyRequest) -> bytes:
        ids = [self._identity.controller_id] if self._identity.controller_id >= request.controller_id else []
        return struct.pack(f"<H{len(ids)}H", len(ids), *ids)

    def _check_nsid(self, nsid: int) -> None:
        if not 1 <= nsid <= self.namespace_count:
            raise NvmeError(
                StatusCode.INVALID_NAMESPACE,
                f"namespace {nsid:#x}; valid are 1 to {self.namespace_count}",
                location=4,
            )


def _identify_namespace(namespace: Namespace) -> bytes:
    blocks = namespace.blocks
    identity = namespace.identity
    return pack_fields(
        IDENTIFY_SIZE,
        (
            (0, "Q", blocks),
            (8, "Q", blocks),
            (16, "Q", blocks),
            (33, "B", _DLFEAT),
            (48, "O", blocks << namespace.lba_shift),
            (104, "s", identity.nguid),
            (120, "s", identity.eui64),
            (128, "I", namespace.lba_shift << 16),
        ),
    )
