"""Small images, sources, manifest rows and verdict tables, shared by the tests of the jobs."""

import io
import logging
import re
import signal
import sys
import tarfile
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from datetime import UTC, datetime
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.dataset import schema
from jobs.dataset.manifest import image_id
from jobs.storage import filesystems, uris, writing

WRITE = "0350u5hCzAVh2Lq0Het1VW_76da3a83828345c7a7b1264e4caa1291"
"""Ray Data's ids of a dataset and of a write, which its file names begin with."""


def rows_file(attempt: str, task: int = 0) -> str:
    """The file of rows of a write task below the folder of an attempt, under the name that Ray Data gives it."""
    return f"{attempt}/rows/{WRITE}_{task:06d}-0.parquet"


def image_file(seed: int = 0, file_format: str = "PNG", width: int = 56, height: int = 40, **options: Any) -> bytes:
    """The content of an image file, one of its own for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


@cache
def big_image_file(side_px: int = 8000) -> bytes:
    """A small file that keeps a decoder busy for seconds: a square of one grey."""
    buffer = io.BytesIO()
    Image.new("L", (side_px, side_px), 128).save(buffer, "PNG")
    return buffer.getvalue()


def new_bucket() -> str:
    """The URI of a new, empty bucket on the S3 server of the environment."""
    name = f"bucket-{uuid.uuid4().hex}"
    system, _ = filesystems.filesystem(f"s3://{name}")
    with suppress(FileExistsError):  # the name is ours alone: an answer was lost, and the client asked again
        system.mkdir(name)
    return f"s3://{name}"


def put(place: str, files: Mapping[str, bytes]) -> str:
    """Write files below a folder or bucket; returns the place."""
    for name, content in files.items():
        writing.write_bytes(uris.join(place, name), content)
    return place


def tar_bytes(files: Mapping[str, bytes], **options: Any) -> bytes:
    """A tar of these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=options.pop("mode", "w"), **options) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def parquet_bytes(
    columns: Mapping[str, Any], metadata: Mapping[str, str | bytes] | None = None, **options: Any
) -> bytes:
    """A Parquet file of these columns; `metadata`: of its schema."""
    sink = pa.BufferOutputStream()
    table = pa.table(dict(columns))
    pq.write_table(table.replace_schema_metadata(metadata) if metadata else table, sink, **options)
    return bytes(sink.getvalue())


def manifest_row(uri: str | Path, **values: Any) -> dict[str, Any]:
    """A row of a manifest."""
    row = dict.fromkeys(schema.MANIFEST.names) | {"uri": str(uri), "etag": "", "listed": False} | values
    return row | {"image_id": values.get("image_id", image_id(row["uri"], row["etag"]))}


def manifest_table(*rows: dict[str, Any]) -> pa.Table:
    """Manifest rows as a table."""
    return pa.Table.from_pylist(list(rows), schema=schema.MANIFEST)


def todo_row(uri: str | Path, **values: Any) -> dict[str, Any]:
    """A row of what an attempt has to do: a manifest row, without a known caption unless it is given."""
    return dict.fromkeys(schema.TODO.names) | {schema.WANTED.name: 1} | manifest_row(uri, **values)


def todo_table(*rows: dict[str, Any]) -> pa.Table:
    """Rows of what an attempt has to do as the table that a stage is given."""
    return pa.Table.from_pylist(list(rows), schema=schema.TODO)


def batches(rows: Iterable[Mapping[str, Any]], columns: pa.Schema, size: int = 1000) -> Iterator[pa.RecordBatch]:
    """Rows as a stream of Arrow batches of this schema; keys that it does not have are dropped."""
    left = iter(rows)
    while some := [dict(row) for row in islice(left, size)]:
        yield pa.RecordBatch.from_pylist(some, schema=columns)


def read_rows(uri: str) -> list[dict[str, Any]]:
    """All rows of a Parquet file, on a disk or in a bucket."""
    system, path = filesystems.arrow_filesystem(uri)
    with pq.ParquetFile(path, filesystem=system) as file:  # a folder `run_id=...` above it is no column
        rows: list[dict[str, Any]] = file.read().to_pylist()
    return rows


def verdict_row(uri: str, prob_fake: float | None, **values: Any) -> dict[str, Any]:
    """A row of published verdicts; without a probability it is one that failed."""
    failed = {"error_stage": "decode", "error_class": "ImageCorruptError", "error_message": "cut off"}
    scored: dict[str, Any] = {"prob_fake": prob_fake, "verdict": "fake" if (prob_fake or 0.0) >= 0.5 else "real"}
    outcome = {"status": "failed", **failed} if prob_fake is None else {"status": "scored", **scored}
    constant = {"detector_id": "d" * 16, "run_id": "r", "scored_at": datetime(2026, 1, 2, tzinfo=UTC), "threshold": 0.5}
    identity = {"image_id": image_id(uri, ""), "uri": uri, "etag": ""}
    return dict.fromkeys(schema.VERDICTS.names) | identity | constant | outcome | values


def verdict_table(*rows: dict[str, Any]) -> pa.Table:
    """Verdict rows as a table."""
    return pa.Table.from_pylist(list(rows), schema=schema.VERDICTS)


def save_bundle(folder: Path) -> Path:
    """A small detector with a captioner of its own, as a bundle; its weights are random and its scores differ."""
    from nsnet.captioner import save_tiny_captioner
    from tests.support.models import as_if_trained

    captioner = folder / "captioner"
    captioner.mkdir(parents=True)
    save_tiny_captioner(captioner, seed=0)
    as_if_trained().save(folder / "bundle", captioner=captioner)
    return folder / "bundle"


MARK = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (\d{8}T\d{6}Z-[0-9a-f]{6} )?")


def unmarked(log: str) -> str:
    """Lines of a log without the time and the run that each must begin with; click ends a line at Ctrl-C.

    The last line of some commands, `summary {...}`, is left out.
    """
    lines = log.splitlines(keepends=True)
    if lines and lines[-1].startswith("summary {"):
        lines.pop()
    assert all(MARK.match(line) or line == "\n" for line in lines), log
    return "".join(MARK.sub("", line, count=1) for line in lines)


def run_command(*arguments: str) -> tuple[int, str, str]:
    """`nsnet` with these arguments, in this process -> (exit code, stdout, stderr `unmarked`), which must be UTF-8."""
    from jobs import cli
    from jobs.console import main

    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    loggers = [logging.getLogger(name) for name in (None, *logging.Logger.manager.loggerDict)]
    before = [(logger, logger.level, logger.filters[:]) for logger in loggers]
    terminated = signal.getsignal(signal.SIGTERM)
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        redirect_stdout(streams[0]),
        redirect_stderr(streams[1]),
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", ["nsnet", *arguments])
        main.run(cli.group, "nsnet")
    signal.signal(signal.SIGTERM, terminated)
    for logger, level, filters in before:
        if logger.level != level:  # `setLevel` takes long: it visits all loggers
            logger.setLevel(level)
        logger.filters[:] = filters
    for stream in streams:
        stream.seek(0)
    code = ended.value.code
    assert isinstance(code, int)
    return code, streams[0].read(), unmarked(streams[1].read())
