"""DMA_MAP and DMA_UNMAP of one client, turned into IOMMU mappings by the worker."""

from __future__ import annotations

import errno
import resource
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from vfiouser_oob.config.values import format_size
from vfiouser_oob.devices.kernel_vfio.dma import CHUNK_SIZE, DmaSpace
from vfiouser_oob.devices.kernel_vfio.worker import BUDGET_ADVICE, SLOW_S, Job, OrderedWorker, explained
from vfiouser_oob.observability.log import Logger
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.dma import DmaRegion
from vfiouser_protocol.errors import CommandError

# The kernel allocates, clears and locks all of the memory that is mapped.
_ADVICE = f"allocate the VM's memory beforehand (prealloc=on), or {BUDGET_ADVICE}"
_REASONS: Mapping[int, str] = {
    errno.EEXIST: "the IOMMU has a mapping there already",
    errno.ENOSPC: "the IOMMU takes no more mappings (module option dma_entry_limit of vfio_iommu_type1)",
    errno.EFAULT: "the file is shorter than the range, or may not be written",
    errno.EACCES: "the descriptor does not allow this access",
    errno.EPERM: "the file is sealed against this access",
    errno.ENODEV: "the descriptor is of a kind that cannot be mapped",
    errno.EINVAL: "the IOMMU does not take these addresses",
}


class IommuMaps:
    """The client's memory in the IOMMU.

    Args:
        space: the address space.
        worker: the function's worker.
        log: for slow and for ignored mappings.
    """

    def __init__(self, space: DmaSpace, worker: OrderedWorker, log: Logger) -> None:
        self._space = space
        self._worker = worker
        self._log = log
        self._mapped_bytes = 0

    def check(self, region: DmaRegion) -> None:
        """Refuse what the IOMMU would refuse, in words.

        Args:
            region: a range with a file.

        Raises:
            CommandError: EINVAL.
        """
        where = f"DMA_MAP {region.address:#x}+{region.size:#x}"
        page = self._space.page_size
        if not region.readable and not region.writable:
            raise CommandError(f"{where} allows neither reading nor writing; not mapped")
        if (region.address | region.size | region.offset) % page:
            raise CommandError(
                f"{where} with file offset {region.offset:#x}: the IOMMU maps whole pages of {page} bytes; not mapped"
            )
        windows = self._space.windows
        if windows and not any(first <= region.address and region.end - 1 <= last for first, last in windows):
            allowed = ", ".join(f"{first:#x}-{last:#x}" for first, last in windows)
            raise CommandError(f"{where} is not inside what the IOMMU can address ({allowed}); not mapped")

    def restore(self, size: int) -> None:
        """Know of bytes that are mapped already."""
        self._mapped_bytes += size

    def map(
        self,
        region: DmaRegion,
        fd: OwnedFd,
        failed: Callable[[], object],
        succeeded: Callable[[], object] = lambda: None,
        *,
        again: bool = False,
    ) -> Job[Any]:
        """Map a range; what was mapped of it is taken back if the caller stops waiting.

        Args:
            region: what `check` passed.
            fd: its file; owned from now on.
            failed: called when the range is not mapped after all.
            succeeded: called when it is, though perhaps nobody waits for it any more.
            again: another process may have mapped it, or a part of it, already.

        Returns:
            The job; it raises CommandError with the kernel's errno.
        """

        def work(job: Job[int]) -> int:
            try:
                if again:
                    self._space.unmap(region.address, region.size)
                return self._map(job, region, fd.fileno())
            except OSError as error:
                raise self._refusal(region, error) from error

        undo = partial(self._unmap, region.address)
        return self._worker.submit(Job(work, undo, failed=failed, succeeded=succeeded, finish=fd.close))

    def _map(self, job: Job[int], region: DmaRegion, fd: int) -> int:
        """Map piece by piece, so that an abandoned mapping ends soon; returns the bytes mapped."""
        started = reported = time.monotonic()
        done = 0
        try:
            while done < region.size and not job.abandoned:
                size = min(CHUNK_SIZE, region.size - done)
                self._space.map(
                    fd,
                    region.offset + done,
                    region.address + done,
                    size,
                    read=region.readable,
                    write=region.writable,
                )
                done += size
                now = time.monotonic()
                if now - reported >= SLOW_S and done < region.size:
                    reported = now
                    self._note_progress(job, region, done, now - started)
        except OSError:
            if done:
                self._space.unmap(region.address, done)
            raise
        self._mapped_bytes += done
        self._report(job, region, done, time.monotonic() - started)
        return done

    def _note_progress(self, job: Job[int], region: DmaRegion, done: int, seconds: float) -> None:
        fields = {
            "address": f"{region.address:#x}",
            "done": format_size(done),
            "of": format_size(region.size),
            "seconds": seconds,
        }
        left = seconds / done * (region.size - done)
        if time.monotonic() + left > job.until:
            self._log.warning("mapping memory will take longer than the reply budget", advice=_ADVICE, **fields)
        else:
            self._log.info("mapping memory", **fields)

    def _report(self, job: Job[int], region: DmaRegion, done: int, seconds: float) -> None:
        fields = {"address": f"{region.address:#x}", "size": format_size(region.size), "seconds": seconds}
        if job.abandoned:
            self._log.warning(
                "mapping memory took too long; it is undone", done=format_size(done), advice=_ADVICE, **fields
            )
        elif seconds >= SLOW_S:
            self._log.warning("mapping memory was slow; a client may not wait that long", advice=_ADVICE, **fields)
        else:
            self._log.debug("memory mapped", **fields)

    def unmap(self, region: DmaRegion, succeeded: Callable[[], object]) -> Job[None]:
        """Unmap a range.

        Args:
            region: the range.
            succeeded: called when the device has stopped using it.

        Returns:
            The job; it raises CommandError with the kernel's errno.
        """
        what = f"unmapping {region.address:#x}+{region.size:#x}"
        work = explained(what, partial(self._unmap, region.address, region.size))
        return self._worker.submit(Job(work, always=True, succeeded=succeeded))

    def unmap_all(self, succeeded: Callable[[], object]) -> Job[None]:
        """Unmap everything; as `unmap`."""

        def work() -> None:
            self._space.unmap_all()
            self._mapped_bytes = 0

        return self._worker.submit(Job(explained("unmapping all memory", work), always=True, succeeded=succeeded))

    def _unmap(self, address: int, size: int) -> None:
        if size:
            self._space.unmap(address, size)
            self._mapped_bytes -= size

    def _refusal(self, region: DmaRegion, error: OSError) -> CommandError:
        number = error.errno or errno.EIO
        reason = self._memlock_reason(region) if number == errno.ENOMEM else _REASONS.get(number, error.strerror)
        return CommandError(f"DMA_MAP {region.address:#x}+{region.size:#x} failed: {reason}; not mapped", number)

    def _memlock_reason(self, region: DmaRegion) -> str:
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if limit == resource.RLIM_INFINITY:
            return "the machine has not enough memory"
        needed = self._mapped_bytes + region.size
        shared = f" ({self._space.accounting})" if self._space.accounting else ""
        return (
            f"with this range {needed} bytes would be locked, and the limit of locked memory is {limit} bytes{shared}; "
            f"raise it to the VM's memory and some more (LimitMEMLOCK= in the service's unit)"
        )
