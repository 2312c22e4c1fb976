"""What an agent's answers must be, whoever asked: each rule of `Session` about a result, once.

An answer that breaks one is a `ProtocolError`: the agent does not speak the interface, and what it says is not used.
"""

from __future__ import annotations

from vfiouser_agents.errors import ProtocolError
from vfiouser_agents.values import Chunk, DirtyReport, Phase


def check_chunk(chunk: Chunk, limit: int, phase: Phase) -> Chunk:
    """Check the answer to `save`.

    Args:
        chunk: the answer.
        limit: bytes that were asked for.
        phase: the phase that it was asked in.

    Returns:
        The chunk.

    Raises:
        ProtocolError: it is more than was asked for, or nothing for no reason, or its end is of the other phase.
    """
    if len(chunk.data) > limit:
        raise ProtocolError(f"the agent gave {len(chunk.data)} bytes of state; {limit} were asked for")
    if not (chunk.data or chunk.eof or chunk.drained):
        raise ProtocolError("the agent gave no state, but says neither eof nor drained")
    if chunk.eof and phase is Phase.PRECOPY:
        raise ProtocolError("the agent says eof in pre-copy; only drained is allowed there")
    if chunk.drained and phase is Phase.FINAL:
        raise ProtocolError("the agent says drained for a stopped function; only eof is allowed there")
    return chunk


def check_report(report: DirtyReport, iova: int, length: int, page_size: int) -> DirtyReport:
    """Check the answer to `dirty_report`.

    Args:
        report: the answer.
        iova: beginning of the range that was asked for.
        length: its bytes.
        page_size: of the log, in bytes.

    Returns:
        The report.

    Raises:
        ProtocolError: the report is not about that range.
    """
    wanted = (length // page_size + 7) // 8
    if report.bitmap is not None and len(report.bitmap) != wanted:
        raise ProtocolError(f"the agent's dirty bitmap has {len(report.bitmap)} bytes; {wanted} are needed")
    end = iova + length
    if any(span.iova < iova or span.iova + span.length > end for span in report.ranges):
        raise ProtocolError(f"the agent's dirty ranges leave {length} bytes at {iova:#x}")
    return report
