"""Tars of strangers beside one good image: listing and fetching."""

import io
import random
import tarfile
from functools import cache
from pathlib import Path
from typing import Any, Final

from jobs.dataset import containers, fetching
from jobs.dataset.source import Source
from nsnet.errors import ImageError
from tests.fuzz.mutations import EXTREMES, checked, mutated, pieces, repair
from tests.support.tables import image_file, tar_bytes

MAX_FETCHED: Final = 8
MAX_BYTES: Final = 2**22
"""Of an image that is fetched."""


def member(name: str, content: bytes = b"", **values: Any) -> tuple[tarfile.TarInfo, bytes]:
    found = tarfile.TarInfo(name)
    found.size = len(content)
    for key, value in values.items():
        setattr(found, key, value)
    return found, content


def tar_of(*members: tuple[tarfile.TarInfo, bytes], how: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=how) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def sparse(old: bool) -> bytes:
    """A file with holes, in GNU's old layout or in that of PAX."""
    if not old:
        records = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "s.png",
            "GNU.sparse.realsize": "9",
        }
        return tar_of(
            member("s.png", b"1\n0\n4\n".ljust(512, b"\0") + b"data", pax_headers=records), how=tarfile.PAX_FORMAT
        )
    block = bytearray(tar_of(member("s.png", b"data"))[:512])
    block[156:157], block[386:410], block[483:495] = (
        b"S",
        b"00000000000\00000000000004"[:24].ljust(24, b"0"),
        b"00001000000\0",
    )
    return checked(bytes(block)) + b"data".ljust(512, b"\0") + bytes(1024)


@cache
def corpus() -> list[bytes]:
    """Whole tars of many layouts."""
    image, long = image_file(1, width=24, height=24), "folder/" * 30 + "x.png"
    plain = {
        "0_real/a.png": image,
        "a.json": b"{}",
        "1_fake/b.jpg": image,
        "1_fake/b.cls": b"1",
        ".hidden/c.png": image,
    }
    kinds = [
        member(f"kind{number}", type=kind, linkname="../../etc/passwd", devmajor=1, devminor=3)
        for number, kind in enumerate((b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"A", b"x", b"Z"))
    ]
    records = {
        "path": "é.png",
        "size": "4",
        "comment": "c" * 300,
        "SCHILY.xattr.user": "x",
        "mtime": "1e9",
        "hdrcharset": "BINARY",
    }
    found = [tar_bytes(plain, format=how) for how in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    found += [tar_of(member(long, image), member("y" * 150, b"", type=b"2", linkname=long), how=how) for how in (1, 2)]
    found += [tar_of(*kinds), tar_of(member("x.png", b"data", pax_headers=records), how=2), sparse(True), sparse(False)]
    found += [tar_of(member("../../up.png", image), member("/abs.png", image), member("n\0l\udcff.png", image))]
    found += [tar_of(*[member(f"{i:04d}{end}", b"1") for i in range(40) for end in (".png", ".cls", ".json")])]
    found += [tar_of(member("same.png", image), member("same.png", image)), b"".join(found[:2]), b"not a tar" * 200]
    return found


def write(seed: int, folder: Path) -> None:
    """A folder with a good image and the tar of a case."""
    rng = random.Random(f"tars {seed}")
    data = rng.choice(corpus())
    kind = rng.randrange(4)
    if kind < 2:
        data = damaged_header(rng, data)
    if kind > 0:
        data = mutated(rng, data, rng.choice(corpus()))
    if kind == 2:
        data = repair(rng, data, b"")
    (folder / "good.png").write_bytes(image_file(2))
    (folder / "x.tar").write_bytes(data)


def damaged_header(rng: random.Random, data: bytes) -> bytes:
    """One field of a header, or a PAX record, gets an extreme value; the check sum is right again."""
    blocks = pieces(data)
    at = rng.randrange(len(blocks))
    start, length = rng.choice(
        ((0, 100), (100, 8), (124, 12), (124, 12), (136, 12), (156, 1), (157, 100), (345, 155), (386, 97))
    )
    value = rng.choice(EXTREMES)
    field = rng.choice((
        b"%o" % value, b"\x80" + value.to_bytes(length, "big", signed=False)[-length:] if length > 8 else b"\xff",
        b"-1", rng.choice((b"L", b"K", b"x", b"g", b"S", b"0", b"\0", b"5")), rng.randbytes(length),
        b"%d size=%d\n" % (value, value),
    ))  # fmt: skip
    block = bytearray(blocks[at].ljust(512, b"\0"))
    block[start : start + length] = field[:length].ljust(length, b"\0")
    blocks[at] = checked(bytes(block))
    return b"".join(blocks)


def run(folder: Path) -> str:
    """List the folder and fetch some rows: the good image is there, and the tar's are, or it is left out by name."""
    source = Source(str(folder))
    rows = list(source.rows())
    most = 1 + (folder / "x.tar").stat().st_size // tarfile.BLOCKSIZE
    assert len(rows) <= most, f"{len(rows)} rows"
    good = [row for row in rows if row["uri"] == f"{folder}/good.png"]
    assert len(good) == 1 and fetching.fetch(good[0], MAX_BYTES).data == image_file(2)
    fetched = "fetched"
    for row in rows[:MAX_FETCHED] + rows[-MAX_FETCHED:]:
        try:
            data = fetching.fetch(row, MAX_BYTES).data
            assert len(data) <= MAX_BYTES + 1
        except ImageError as error:
            fetched = type(error).__name__
    if source.left_out.unread:
        assert all("x.tar" in name for name in source.left_out.named)
        return "left out"
    return fetched if len(rows) > 1 else "no rows"


def close() -> None:
    """End the processes."""
    fetching.close()
    containers._zygote.close()
