"""Backing stores, and functions made from configuration."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import trio

from nvmebed import machine, make_function
from vfiouser_oob.config.errors import ConfigError
from vfiouser_soc.nvme.build import build
from vfiouser_soc.nvme.options import Doorbells, NvmeOptions
from vfiouser_soc.nvme.stores import BackingStore, FileStore, MemoryStore, StoreError

SIZE = 1 << 20


@pytest.mark.parametrize("kind", ["memory", "file"])
async def test_stores_behave_alike(kind: str, tmp_path: Path) -> None:
    """New bytes are zeros, written ones are kept, discarded ones are zeros again, at any alignment."""
    store: BackingStore = MemoryStore(SIZE) if kind == "memory" else FileStore(tmp_path / "image", SIZE)
    assert SIZE == store.size
    assert bytes(100) == await store.read(SIZE - 100, 100)
    expected = bytearray(os.urandom(50_000))
    await store.write(1000, bytes(expected))
    for offset, count in ((0, 10), (3096, 4096), (5000, 20_000), (30_000, 0)):
        await store.discard(1000 + offset, count)
        expected[offset : offset + count] = bytes(count)
        assert bytes(expected) == await store.read(1000, 50_000)
    await store.flush()
    store.close()


async def test_memory_is_taken_only_when_written() -> None:
    """A terabyte namespace costs nothing until it is used."""
    store = MemoryStore(1 << 40)
    await store.write((1 << 40) - 512, b"z" * 512)
    assert b"z" * 512 == await store.read((1 << 40) - 512, 512)
    store.close()


async def test_file_keeps_its_content(tmp_path: Path) -> None:
    """What was written is there when the image is opened again, without naming a size."""
    path = tmp_path / "image"
    store = FileStore(path, SIZE)
    await store.write(512, b"kept")
    store.close()
    again = FileStore(path)
    assert (SIZE, b"kept") == (again.size, await again.read(512, 4))
    again.close()


async def test_shared_image(tmp_path: Path) -> None:
    """Those who share an image see each other's writes at once; who does not share it is kept out, and keeps out."""
    path = tmp_path / "image"
    one, other = FileStore(path, SIZE, shared=True), FileStore(path, shared=True)
    await one.write(512, b"seen")
    assert b"seen" == await other.read(512, 4)
    assert one.identity == other.identity
    with pytest.raises(StoreError, match="to share it"):
        FileStore(path)
    one.close()
    other.close()
    alone = FileStore(path)
    with pytest.raises(StoreError, match="in use by another process, which does not share it"):
        FileStore(path, shared=True)
    alone.close()


async def test_truncated_image_is_an_error(tmp_path: Path) -> None:
    """An image that someone else shortened gives I/O errors, not zeros and not a crash."""
    path = tmp_path / "image"
    store = FileStore(path, SIZE)
    os.truncate(path, 4096)
    with pytest.raises(OSError, match="shorter"):
        await store.read(0, 8192)
    store.close()


def test_unusable_images(tmp_path: Path) -> None:
    """Missing, empty, foreign-sized, locked, or no file: one clear sentence each; nothing is changed."""
    missing = tmp_path / "missing"
    with pytest.raises(StoreError, match="give a size"):
        FileStore(missing)
    assert not missing.exists()
    (tmp_path / "empty").touch()
    with pytest.raises(StoreError, match="empty"):
        FileStore(tmp_path / "empty")
    (tmp_path / "other").write_bytes(bytes(1024))
    with pytest.raises(StoreError, match="left alone"):
        FileStore(tmp_path / "other", 2048)
    with pytest.raises(StoreError, match="cannot be opened"):
        FileStore(tmp_path, 2048)
    with pytest.raises(StoreError, match="neither"):
        FileStore(Path("/dev/null"), 2048)
    first = FileStore(tmp_path / "other")
    with pytest.raises(StoreError, match="in use"):
        FileStore(tmp_path / "other")
    first.close()
    FileStore(tmp_path / "other").close()


async def test_functions_have_names_of_their_own() -> None:
    """Names differ between functions and are the same after a restart."""
    seen = []
    for name in ("f0", "f1", "f0"):
        async with machine(build(name, NvmeOptions(size=SIZE)), io_queue=False) as m:
            controller = await m.driver.identify(1)
            namespace = await m.driver.identify(0, nsid=1)
            uuids = await m.driver.identify(3, nsid=1)
            seen.append((controller[4:24], controller[768:1024], namespace[104:128], uuids))
    assert seen[0] == seen[2]
    assert all(first != second for first, second in zip(seen[0], seen[1], strict=True))
    assert b"f0".ljust(20) == seen[0][0]


def test_build_follows_the_options(tmp_path: Path) -> None:
    """Size, image, doorbells and buffer of the configuration are those of the function."""
    options = NvmeOptions(image=tmp_path / "disk", size=SIZE, cmb=2 << 20, doorbells=Doorbells.POLLED)
    function = build("a" * 40, options)
    assert SIZE == (tmp_path / "disk").stat().st_size
    assert {0, 2} == set(function.regions)
    assert function.regions[0].memory is not None
    assert "polled" in function.summary
    assert "2 MiB controller memory buffer" in function.summary
    with pytest.raises(ConfigError, match=r"function 'g': image .* is in use"):
        build("g", NvmeOptions(image=tmp_path / "disk"))
    function.close()
    (tmp_path / "tiny").write_bytes(b"x")
    with pytest.raises(ConfigError, match="smaller than one block"):
        build("g", NvmeOptions(image=tmp_path / "tiny"))


def test_closing_gives_everything_back(tmp_path: Path) -> None:
    """No descriptor stays open."""
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        build("f", NvmeOptions(image=tmp_path / "disk", size=SIZE, cmb=2 << 20, doorbells=Doorbells.POLLED)).close()
    assert before == set(os.listdir("/proc/self/fd"))


async def test_io_on_an_image_does_not_block_the_event_loop(tmp_path: Path) -> None:
    """While the medium does not answer, other functions' commands complete."""
    go = threading.Event()

    class Stuck(FileStore):
        def _pread(self, offset: int, count: int) -> bytes:
            assert go.wait(10)
            return super()._pread(offset, count)

    async with machine(make_function(Stuck(tmp_path / "image", SIZE))) as slow, machine() as fast:
        cid = slow.driver.submit(slow.io, 2, nsid=1, prp1=slow.driver.alloc(4096))
        for _ in range(20):
            await fast.driver.read_blocks(0, 1)
        assert 0 == slow.driver.collect(slow.io)
        go.set()
        await slow.driver.wait(slow.io, cid)
    await trio.lowlevel.checkpoint()
