"""Commands of this host that move a state from and to places that a protocol cannot reach."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import trio

from vfiouser_agents.errors import AgentError

#: Bytes of what a command says on its standard error that are kept.
_KEPT = 2000


async def run_command(words: Sequence[str], data: bytes | None, limit: int) -> bytes:
    """Run a command to its end; it is killed if the caller is cancelled.

    Args:
        words: the command and its arguments; no shell is involved.
        data: what it gets on its standard input; None = nothing.
        limit: bytes of output that are wanted.

    Returns:
        Its output; one byte more than the limit if there was more.

    Raises:
        AgentError: it could not be started, or it failed.
    """
    try:
        process = await trio.lowlevel.open_process(
            list(words),
            stdin=subprocess.DEVNULL if data is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except OSError as error:
        raise AgentError(f"command {words[0]!r} cannot be run: {error.strerror or error}") from error
    output, said = bytearray(), bytearray()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_feed, process, data)
            nursery.start_soon(_collect, process.stderr, said, None)
            await _collect(process.stdout, output, limit + 1)
            if len(output) > limit:
                process.kill()
        status = await process.wait()
    finally:
        await _end(process)
    if status and len(output) <= limit:
        words_shown = " ".join(words)
        last = bytes(said[-_KEPT:]).decode(errors="replace").strip()
        raise AgentError(f"command {words_shown!r} ended with {status}: {last or 'it said nothing'}")
    return bytes(output)


async def _feed(process: trio.Process, data: bytes | None) -> None:
    if process.stdin is not None and data is not None:
        try:
            async with process.stdin:
                await process.stdin.send_all(data)
        except trio.BrokenResourceError:
            pass  # it ended without reading everything, which its status tells


async def _collect(stream: trio.abc.ReceiveStream | None, into: bytearray, limit: int | None) -> None:
    assert stream is not None
    async for piece in stream:
        into += piece
        if limit is None:
            del into[:-_KEPT]
        elif len(into) >= limit:
            del into[limit:]
            return


async def _end(process: trio.Process) -> None:
    with trio.CancelScope(shield=True):
        if process.returncode is None:
            process.kill()
        await process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                await stream.aclose()
