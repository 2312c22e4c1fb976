"""A guest's driver of the companion device, played from its shell, whether the guest's kernel has one or not.

To QEMU it is a driver that is bound and has sent nothing, as Linux's is as long as nobody mounts anything.

Spec: VIRTIO 1.2, 4.1.4 (virtio over PCI); QEMU, hw/virtio/virtio-pci.c (the common structure begins BAR 4).
"""

from __future__ import annotations

from collections.abc import Iterator

from vmbed.guest import Guest

__all__ = ["SPARE_MEMORY", "bind_companion", "unbind_companion"]

#: What keeps the guest's kernel off the queues' memory, which is just above.
SPARE_MEMORY = "mem=120M iomem=relaxed"
_RINGS = 120 << 20
_PART, _QUEUES, _QUEUE_SIZE = 0x1000, 2, 16
_FEATURE_SELECT, _FEATURE, _STATUS, _QUEUE, _SIZE, _ENABLE, _RING = 8, 12, 20, 22, 24, 28, 32
_ACKNOWLEDGE, _DRIVER, _DRIVER_OK, _FEATURES_OK = 1, 2, 4, 8
_UNBIND = "at=/sys/bus/pci/devices/0000:00:1c.0; [ ! -e $at/driver ] || echo 0000:00:1c.0 >$at/driver/unbind; "
_OPEN = (
    f"{_UNBIND}"
    "echo 1 >$at/enable && printf '\\006\\004' | dd of=$at/config bs=1 seek=4 conv=notrunc 2>/dev/null && "
    "set -- $(sed -n 5p $at/resource) && bar=$(($1)) && "
    "put() { devmem $((bar + $1)) $2 $3; }"
)


async def unbind_companion(guest: Guest) -> None:
    """Take the driver away that the guest's kernel may have."""
    await guest.check(f"sh {_UNBIND}[ ! -e $at/driver ]")


async def bind_companion(guest: Guest) -> None:
    """Do what a driver does until the device runs."""
    steps = " && ".join(f"put {offset} {bits} {value}" for offset, bits, value in _steps())
    await guest.check(f"sh {_OPEN}; {steps} && [ $(devmem $((bar + {_STATUS})) 8) = 0x0F ]")


def _steps() -> Iterator[tuple[int, int, int]]:
    for status in (0, _ACKNOWLEDGE, _ACKNOWLEDGE | _DRIVER):
        yield _STATUS, 8, status
    for half in (0, 1):  # nothing but VERSION_1, which is bit 32
        yield _FEATURE_SELECT, 32, half
        yield _FEATURE, 32, half
    yield _STATUS, 8, _ACKNOWLEDGE | _DRIVER | _FEATURES_OK
    for queue in range(_QUEUES):
        yield _QUEUE, 16, queue
        yield _SIZE, 16, _QUEUE_SIZE
        for part in range(3):
            yield _RING + 8 * part, 32, _RINGS + (3 * queue + part) * _PART
            yield _RING + 8 * part + 4, 32, 0
        yield _ENABLE, 16, 1
    yield _STATUS, 8, _ACKNOWLEDGE | _DRIVER | _FEATURES_OK | _DRIVER_OK
