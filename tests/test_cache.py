import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vision_ssl import cache
from vision_ssl.cache import Bad, Cached
from vision_ssl.decode import Pixels, decode_file
from vision_ssl.errors import DataError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Forty pictures of 20 x 24 noise."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{index:02}.png")
    return folder


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def read(root: Path, directory: Path, size: int = 16) -> Cached:
    return cache.files(root, names(root), size, directory)


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != "fingerprints")


class Calls:
    """Counts the calls of a function of `cache`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.count = 0
        function: Callable[..., object] = getattr(cache, name)

        def counted(*args: object) -> object:
            self.count += 1
            return function(*args)

        monkeypatch.setattr(cache, name, counted)


def test_images_come_decoded_and_in_order(root: Path, directory: Path) -> None:
    cached = read(root, directory)
    expected = np.stack([decode_file(root / name, 16) for name in names(root)])
    np.testing.assert_array_equal(cached.pixels.numpy(), expected)
    assert cached.skipped == {}
    assert entries(directory) == [cached.digest]


def test_unchanged_files_are_neither_decoded_nor_read_again(
    root: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(root, directory)
    decoded, hashed = Calls(monkeypatch, "decode_file"), Calls(monkeypatch, "_hash_file")
    second = read(root, directory)
    assert (decoded.count, hashed.count) == (0, 0)
    assert second.digest == first.digest
    assert torch.equal(second.pixels, first.pixels)


def test_touched_files_are_read_again_but_not_decoded(
    root: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(root, directory)
    os.utime(root / "07.png", ns=(1, 1))
    decoded, hashed = Calls(monkeypatch, "decode_file"), Calls(monkeypatch, "_hash_file")
    assert read(root, directory).digest == first.digest
    assert (decoded.count, hashed.count) == (0, 40)


def test_another_size_decodes_but_does_not_read_twice(
    root: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(root, directory, size=16)
    decoded, hashed = Calls(monkeypatch, "decode_file"), Calls(monkeypatch, "_hash_file")
    second = read(root, directory, size=8)
    assert (decoded.count, hashed.count) == (40, 0)
    assert second.digest != first.digest
    assert second.pixels.shape == (40, 3, 8, 8)


def test_changed_content_is_another_entry(root: Path, directory: Path) -> None:
    first = read(root, directory)
    Image.new("RGB", (20, 24), (1, 2, 3)).save(root / "07.png")
    second = read(root, directory)
    assert second.digest != first.digest
    assert second.pixels[7, :, 0, 0].tolist() == [1, 2, 3]


def test_a_renamed_file_and_a_swap_are_other_entries(root: Path, directory: Path) -> None:
    digests = {read(root, directory).digest}
    (root / "07.png").rename(root / "07.renamed.png")  # in the same place of the order
    digests.add(read(root, directory).digest)
    (root / "01.png").rename(root / "x")
    (root / "02.png").rename(root / "01.png")
    (root / "x").rename(root / "02.png")
    digests.add(read(root, directory).digest)
    assert len(digests) == 3


def test_another_decoder_is_another_entry(root: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(root, directory)
    monkeypatch.setattr(cache, "DECODER_VERSION", 10**6)
    assert read(root, directory).digest != first.digest


def test_a_copy_elsewhere_shares_the_entry(
    root: Path, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(root, directory)
    copy = shutil.copytree(root, tmp_path / "copy")
    decoded = Calls(monkeypatch, "decode_file")
    assert read(copy, directory).digest == first.digest
    assert decoded.count == 0


def test_folders_that_differ_in_content_alone_are_told_apart(directory: Path, tmp_path: Path) -> None:
    digests = set()
    for name, colour in (("one", 10), ("two", 20)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 24), (colour,) * 3).save(tmp_path / name / "a.bmp")
        os.utime(tmp_path / name / "a.bmp", ns=(1, 1))  # as archives do that can be reproduced
        digests.add(read(tmp_path / name, directory).digest)
    assert len(digests) == 2


def test_a_fingerprint_that_was_cut_short_is_not_believed(root: Path, directory: Path) -> None:
    first = read(root, directory)
    (fingerprint,) = (directory / "fingerprints").iterdir()
    fingerprint.write_text("")
    assert read(root, directory).digest == first.digest


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads the memory map from /proc")
def test_pixels_are_mapped_and_not_read(root: Path, directory: Path) -> None:
    cached = cache.fill(directory, "zeros", (np.zeros((3, 64, 64), np.uint8) for _ in range(400)), 400)
    smaps = Path("/proc/self/smaps").read_text()
    mapping = smaps.split(str(directory / cached.digest / "pixels.u8"))[1]
    size, resident = (int(mapping.split(f"{field}:")[1].split()[0]) for field in ("Size", "Rss"))
    assert size == 400 * 3 * 64 * 64 // 1024
    assert resident < size / 10


def test_a_write_to_the_pixels_stays_out_of_the_cache(root: Path, directory: Path) -> None:
    cached = read(root, directory)
    before = cached.pixels.clone()
    cached.pixels.zero_()
    assert torch.equal(read(root, directory).pixels, before)


@pytest.mark.parametrize("damage", ["pixels.u8", "meta.json", "{}", "[]", "missing"])
def test_a_damaged_entry_is_built_again(damage: str, root: Path, directory: Path) -> None:
    first = read(root, directory)
    expected = first.pixels.clone()
    entry = directory / first.digest
    if damage in ("{}", "[]"):
        (entry / "meta.json").write_text(damage)
    elif damage == "missing":
        shutil.rmtree(entry)
    else:
        with (entry / damage).open("r+b") as file:
            file.truncate(17)
    again = read(root, directory)
    assert torch.equal(again.pixels, expected)
    assert entries(directory) == [first.digest]


def test_bad_files_are_left_out_and_remembered(root: Path, directory: Path) -> None:
    (root / "07.png").write_bytes(b"no picture")
    (root / "09.png").write_bytes((root / "09.png").read_bytes()[:500])
    first, second = read(root, directory), read(root, directory)
    assert first.skipped == second.skipped
    assert first.skipped[7] == Bad("07.png", "not an image that Pillow can read")
    assert list(first.skipped) == [7, 9]
    assert len(first.pixels) == len(second.pixels) == 38
    np.testing.assert_array_equal(first.pixels[7], decode_file(root / "08.png", 16))


def test_pillows_remarks_on_a_file_are_not_passed_on(root: Path, directory: Path) -> None:
    with Image.open(root / "07.png") as image:
        image.save(root / "07.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):
        decode_file(root / "07.jpg", 16)
    assert read(root, directory).skipped == {}


def test_a_file_that_cannot_be_opened_is_bad(root: Path, directory: Path) -> None:
    (root / "07.png").unlink()
    (root / "07.png").symlink_to(root / "gone.png")
    assert read(root, directory).skipped == {7: Bad("07.png", "No such file or directory")}


def test_a_file_that_becomes_readable_is_read(root: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "07.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    with monkeypatch.context() as patch:  # the superuser may read a file whatever its permissions
        patch.setattr(Path, "read_bytes", refuse)
        locked = read(root, directory)
    assert read(root, directory).digest != locked.digest


def test_more_than_five_percent_bad_is_an_error(root: Path, directory: Path) -> None:
    for name in ("01.png", "02.png", "03.png"):
        (root / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"3 of 40 images cannot be decoded, more than 5%: 01\.png \(not an image"):
        read(root, directory)
    assert entries(directory) == []


def test_many_bad_files_are_counted_and_the_first_named() -> None:
    assert cache.first_few([str(Bad(str(index), "no")) for index in range(7)], limit=2) == "0 (no), 1 (no) and 5 more"
    assert cache.first_few(["a", "b"], limit=2) == "a, b"


def images(count: int) -> Iterator[Pixels]:
    for index in range(count):
        yield np.full((2, 4, 4), index, np.uint8)


def test_by_default_an_entry_is_named_by_what_is_written(directory: Path) -> None:
    digests = {cache.fill(directory, "array", images(count), count).digest for count in (3, 4, 4)}
    flat = (image.reshape(4, 2, 4) for image in images(4))
    digests.add(cache.fill(directory, "array", flat, None).digest)
    assert len(digests) == 3
    assert all(len(digest) == len(hashlib.sha256().hexdigest()) for digest in digests)
    assert set(entries(directory)) == digests


def test_what_was_left_out_is_part_of_the_name(directory: Path) -> None:
    def with_bad(index: int) -> Iterator[Pixels | Bad]:
        for number, image in enumerate(images(40)):
            yield image
            if number == index:
                yield Bad(f"item {index}", "no")

    cached = [cache.fill(directory, "array", rows, None) for rows in (images(40), with_bad(3), with_bad(4))]
    assert len({entry.digest for entry in cached}) == 3
    assert [list(entry.skipped) for entry in cached] == [[], [4], [5]]


def test_no_images(directory: Path) -> None:
    with pytest.raises(DataError, match="source empty: looked for images, found none"):
        cache.fill(directory, "empty", iter(()), 0)


def test_the_slower_of_two_builders_discards_its_work(directory: Path) -> None:
    digest = "d" * 64
    inode: list[int] = []

    def overtaken() -> Iterator[Pixels]:
        yield from images(5)
        cache.fill(directory, "fast", images(5), 5, digest)
        inode.append((directory / digest / "pixels.u8").stat().st_ino)

    cached = cache.fill(directory, "slow", overtaken(), 5, digest)
    assert torch.equal(cached.pixels, torch.from_numpy(np.stack(list(images(5)))))
    assert (directory / digest / "pixels.u8").stat().st_ino == inode[0]
    assert entries(directory) == [digest]


READ = """
import sys, time
from pathlib import Path
from vision_ssl import cache
root, directory, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
decode_file = cache.decode_file
cache.decode_file = lambda path, size: (time.sleep(pause), decode_file(path, size))[1]
cached = cache.files(root, sorted(path.name for path in root.iterdir()), 16, directory)
print(cached.digest, int(cached.pixels.sum(dtype=int)))
"""


def start_and_wait_until_it_builds(root: Path, directory: Path, pause: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", READ, str(root), str(directory), str(pause)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(directory.glob(".building-*/pixels.u8")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_two_processes_at_once(root: Path, directory: Path) -> None:
    process = start_and_wait_until_it_builds(root, directory, pause=0.02)
    cached = read(root, directory)
    assert process.communicate(timeout=60)[0] == f"{cached.digest} {cached.pixels.sum(dtype=torch.int64)}\n"
    assert torch.equal(read(root, directory).pixels, cached.pixels)
    assert entries(directory) == [cached.digest]


def test_a_build_that_is_killed_harms_nothing(root: Path, directory: Path) -> None:
    process = start_and_wait_until_it_builds(root, directory, pause=0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    cached = read(root, directory)
    assert len(cached.pixels) == 40
    (building,) = directory.glob(".building-*")  # it may belong to a builder at work: it stays for a day
    os.utime(building / "pixels.u8", (time.time() - 25 * 3600,) * 2)
    read(root, directory, size=8)
    assert not list(directory.glob(".building-*"))


def test_an_interrupted_build_cleans_up(directory: Path) -> None:
    def interrupted() -> Iterator[Pixels]:
        yield from images(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fill(directory, "array", interrupted(), 5)
    assert entries(directory) == []


def test_too_small_a_disk_is_noticed_at_the_first_image(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 999, 999))

    def only_one() -> Iterator[Pixels]:
        yield from images(1)
        pytest.fail("there was work after the first image")

    message = f"cache_dir {directory}: the decoded images need 32,000 bytes, 999 are free; free more, or"
    with pytest.raises(DataError, match=message):
        cache.fill(directory, "array", only_one(), 1000)
    assert entries(directory) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_disk_that_fills_up_meanwhile(directory: Path) -> None:
    def filling() -> Iterator[Pixels]:
        yield from images(1)
        (building,) = directory.glob(".building-*")
        full = os.open("/dev/full", os.O_WRONLY)
        (opened,) = [
            int(link.name)
            for link in Path("/proc/self/fd").iterdir()
            if link.is_symlink() and link.readlink() == building / "pixels.u8"
        ]
        os.dup2(full, opened)
        os.close(full)
        yield from images(9)

    with pytest.raises(DataError, match=rf"cache_dir {directory}: the decoded images need 320 bytes") as raised:
        cache.fill(directory, "array", filling(), 10)
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == errno.ENOSPC
    assert entries(directory) == []


def test_a_cache_that_cannot_be_written(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"^cache_dir .*file: cannot be written: File exists$"):
        read(root, tmp_path / "file")


def test_entries_can_be_shared_as_the_umask_says(root: Path, directory: Path) -> None:
    before = os.umask(0o002)
    try:
        entry = directory / read(root, directory).digest
    finally:
        os.umask(before)
    assert entry.stat().st_mode & 0o777 == 0o775
