"""Parquet files of others: nothing in them is unpickled, and what is read has plain types."""

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data  # noqa: F401 - registers the extension type that unpickles
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

from jobs.dataset import fetching, schema, source
from jobs.dataset.plan import write_manifest
from jobs.dataset.schema import PREDICTIONS
from jobs.evaluation import verdicts
from jobs.experiments.recalibration import _validation
from jobs.pipeline.datasource import ParquetFiles
from jobs.runs import catalog, products, publication
from jobs.storage import parquet, reading, writing
from jobs.storage.parquet_file import ColumnTypeError, ParquetFile
from jobs.training import examples
from nsnet import bundle
from nsnet.errors import NsnetError, SourceError
from tests.fuzz.driver import status
from tests.fuzz.thrift import varint, varints
from tests.support.tables import image_file, parquet_bytes, verdict_row

EXTENSION = "ray.data.arrow_pickled_object"


class _Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A folder that exists once a payload ran."""
    path = tmp_path / "the payload ran"
    pickle.loads(pickle.dumps(_Payload(path)))
    path.rmdir()  # it works
    return path


def pickled(mark: Path, rows: int = 1) -> pa.Array:
    """A column of Ray's type for Python objects."""
    payload = pickle.dumps(_Payload(mark))
    return pa.ExtensionArray.from_storage(ArrowPythonObjectType(), pa.array([payload] * rows, pa.large_binary()))


def nested(column: pa.Array, how: str) -> pa.Array:
    """The column inside another type."""
    if how == "struct":
        return pa.StructArray.from_arrays([column], names=["inner"])
    if how == "list":
        return pa.ListArray.from_arrays(pa.array([0, len(column)], pa.int32()), column)
    if how == "map":
        keys = pa.array(["a"] * len(column))
        return pa.MapArray.from_arrays(pa.array([0, len(column)], pa.int32()), keys, column)
    return column


def file_of(tmp_path: Path, **columns: pa.Array | list[Any]) -> str:
    path = tmp_path / "data" / "x.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize("how", ["plain", "struct", "list", "map"])
def test_extension_type_is_refused_by_name_before_a_value_is_read(how: str, mark: Path, tmp_path: Path) -> None:
    uri = file_of(tmp_path, uri=["a"], odd=nested(pickled(mark), how))
    with parquet.opened(uri) as file:
        assert [batch.to_pylist() for batch in file.batches(["uri"], batch_rows=9)] == [[{"uri": "a"}]]
        with pytest.raises(ColumnTypeError, match=rf"column `odd` has the extension type {EXTENSION}"):
            next(file.batches(["uri", "odd"], batch_rows=9))
        assert not any(isinstance(kind, pa.BaseExtensionType) for kind in file.schema.types)
    assert not mark.exists()


@pytest.mark.parametrize("column", ["uri", "etag", "label", "generator", "split", "size_bytes", "content_hash"])
def test_no_column_of_a_manifest_is_unpickled(column: str, mark: Path, tmp_path: Path) -> None:
    columns = {"uri": pa.array([str(tmp_path / "a.png")]), column: pickled(mark)}
    uri = file_of(tmp_path, **columns)
    with pytest.raises(SourceError, match=EXTENSION):
        write_manifest(uri, str(tmp_path / "manifest.parquet"))
    assert not mark.exists()


@pytest.mark.parametrize("column", ["bytes", "uri", "label", "generator", "split"])
def test_no_column_beside_stored_images_is_unpickled(column: str, mark: Path, tmp_path: Path) -> None:
    content = pa.array([b"x" * 100])
    uri = file_of(tmp_path, **({"bytes": content} | {column: pickled(mark)}))
    with pytest.raises(NsnetError, match=EXTENSION):
        for row in source.Source(uri).rows():
            fetching.fetch(row, 10**6)
    (tmp_path / "data" / "y.png").write_bytes(image_file())
    beside = source.Source(str(tmp_path / "data"))
    for row in beside.rows():
        if row["container"]:  # listed before its bytes are looked at
            with pytest.raises(NsnetError, match=EXTENSION):
                fetching.fetch(row, 10**6)
    assert not mark.exists()


def outputs(column: str, mark: Path, tmp_path: Path, product: products.Product) -> str:
    """A published run, one of whose files holds a payload."""
    row = dict.fromkeys(product.columns.names) | verdict_row("a", 0.5)
    table = pa.Table.from_pylist([row], schema=product.columns)
    table = table.set_column(table.schema.get_field_index(column), column, pickled(mark))
    run = publication.Run(out=str(tmp_path / "out"), product=product, run_id="20260101T000000Z-000000")
    path = Path(run.final) / "part-00000-00000000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(table, path)
    files = [{"path": path.relative_to(run.out).as_posix()}]
    writing.write_json(run.record, {"run_id": run.run_id, "product": product.name, "detector_id": "d", "files": files})
    return run.out


@pytest.mark.parametrize("column", ["uri", "label", "caption", "verdict", "image_id"])
def test_no_column_of_published_rows_is_unpickled(column: str, mark: Path, tmp_path: Path) -> None:
    out = outputs(column, mark, tmp_path, products.VERDICTS)
    columns = pa.schema([schema.VERDICTS.field(column)])
    with pytest.raises(ColumnTypeError, match=EXTENSION):
        list(catalog.published(out, columns))
    with pytest.raises(ColumnTypeError, match=EXTENSION):
        catalog.verdicts(out)
    if column in (*verdicts.NEEDED, *verdicts.WANTED):
        with pytest.raises(ColumnTypeError, match=EXTENSION):
            verdicts.read(out)
    else:  # which an evaluation does not read
        assert verdicts.read(out).num_rows == 1
    assert not mark.exists()


def test_no_column_of_captions_is_unpickled(mark: Path, tmp_path: Path) -> None:
    out = outputs("text_features", mark, tmp_path, products.CAPTIONS)
    with pytest.raises(ColumnTypeError, match=EXTENSION):
        list(catalog.published(out, pa.schema([schema.TEXT_FEATURES]), products.CAPTIONS))
    assert not mark.exists()


@pytest.mark.parametrize("column", verdicts.NEEDED)
def test_no_column_of_a_verdict_file_is_unpickled(column: str, mark: Path, tmp_path: Path) -> None:
    columns: dict[str, Any] = {name: ["x"] for name in verdicts.NEEDED}
    with pytest.raises(ColumnTypeError, match=EXTENSION):
        verdicts.read(file_of(tmp_path, **(columns | {column: pickled(mark)})))
    assert not mark.exists()


def read_split(uri: str) -> object:
    return examples.read_split(uri)


def read_predictions(uri: str) -> object:
    description = bundle.Description(
        detector_id="d", config={}, calibration={}, training={}, clip_digest="", files={}
    )  # fmt: skip
    return _validation(uri, description)


def read_work(uri: str) -> object:
    return [list(task()) for task in ParquetFiles([uri], schema.TODO).get_read_tasks(1)]


@pytest.mark.parametrize(
    ("read", "columns", "column"),
    [
        (read_split, schema.SPLIT, "uri"),
        (read_split, schema.SPLIT, "group"),
        (read_predictions, PREDICTIONS, "detector_id"),
        (read_predictions, PREDICTIONS, "logit"),
        (read_work, schema.TODO, "known_caption"),
        (read_work, schema.TODO, "position"),
    ],
)
def test_nothing_that_a_command_reads_back_is_unpickled(
    read: Callable[[str], object], columns: pa.Schema, column: str, mark: Path, tmp_path: Path
) -> None:
    row = dict.fromkeys(columns.names, None)
    table = pa.Table.from_pylist([row], schema=pa.schema([pa.field(one.name, one.type) for one in columns]))
    table = table.set_column(table.schema.get_field_index(column), column, pickled(mark))
    uri = file_of(tmp_path, **dict(zip(table.schema.names, table.columns, strict=True)))
    with pytest.raises(ColumnTypeError, match=EXTENSION):
        read(uri)
    assert not mark.exists()


def test_work_comes_to_a_task_with_exactly_its_columns(tmp_path: Path) -> None:
    rows = [{"image_id": f"{number}", "uri": "u", "listed": True, "size_bytes": number} for number in range(3)]
    uris = []
    for number, row in enumerate(rows):
        uris.append(str(tmp_path / f"{number}.parquet"))
        parquet.write(pa.Table.from_pylist([row], schema=schema.TODO).to_batches(), schema.TODO, uris[-1])
    tasks = ParquetFiles(uris, schema.TODO).get_read_tasks(1)
    tables = [list(task()) for task in tasks]
    assert [table.schema for some in tables for table in some] == [schema.TODO] * 3
    assert [table["size_bytes"].to_pylist() for some in tables for table in some] == [[0], [1], [2]]


def test_missing_column_is_an_error_unless_it_is_optional(tmp_path: Path) -> None:
    uri = file_of(tmp_path, image_id=["a", "b"])
    wanted = pa.schema([schema.VERDICTS.field("image_id"), schema.TRANSFORM])
    with pytest.raises(KeyError, match="transform"):
        list(parquet.read(uri, wanted))
    (batch,) = parquet.read(uri, wanted, optional=["transform"])
    assert batch.schema == wanted and batch.to_pylist() == [
        {"image_id": "a", "transform": None},
        {"image_id": "b", "transform": None},
    ]


@pytest.mark.parametrize(
    "kind", [pa.timestamp("us"), pa.list_(pa.string()), pa.struct({"a": pa.string()}), pa.date32(), pa.time64("us")]
)
def test_only_plain_types_are_read_from_a_source(kind: pa.DataType, tmp_path: Path) -> None:
    uri = file_of(tmp_path, uri=["a"], label=pa.nulls(1, kind))
    with pytest.raises(SourceError, match="column `label` is of type"):
        list(source.Source(uri).rows())


def test_writers_schema_is_not_believed(tmp_path: Path) -> None:
    """It calls a text what is a number; the file itself knows better."""
    uri = file_of(tmp_path, n=pa.array([7], pa.int64()), t=["a"])
    content = Path(uri).read_bytes()
    other = str(tmp_path / "other.parquet")
    pq.write_table(pa.table({"n": ["7"], "t": ["a"]}), other)
    said = pq.read_metadata(other).metadata[b"ARROW:schema"]
    here = pq.read_metadata(uri).metadata[b"ARROW:schema"]
    assert content.count(here) == 1 and len(said) <= len(here)
    Path(uri).write_bytes(content.replace(here, said.ljust(len(here), b"A")))
    with parquet.opened(uri) as file:
        assert file.schema.field("n").type == pa.int64()
        assert next(file.batches(["n"], batch_rows=1)).to_pylist() == [{"n": 7}]


@pytest.mark.parametrize("length", [2**31, 2**32 - 1, 400])
def test_footer_is_no_longer_than_its_file(length: int, tmp_path: Path) -> None:
    uri = file_of(tmp_path, n=[1])
    content = Path(uri).read_bytes()
    Path(uri).write_bytes(content[:200] + struct.pack("<I", length) + b"PAR1")
    with reading.open_file(uri) as file, pytest.raises(pa.ArrowInvalid, match="metadata are said to have"):
        ParquetFile(file, uri)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1PAR1", b"PAR1" * 3, b"x" * 100])
def test_what_is_no_parquet_is_said_to_be_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    with reading.open_file(str(tmp_path / "x.parquet")) as file, pytest.raises((pa.ArrowException, OSError)):
        ParquetFile(file, "x.parquet")


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_page_that_claims_two_gigabytes_costs_none(version: str, tmp_path: Path) -> None:
    """4 KB of what jobs read back took 2 GB: a buffer of pyarrow is as large as the header of a page says."""
    whole = parquet_bytes({"uri": ["a"] * 30}, use_dictionary=False, data_page_version=version)
    claims = varints(whole, 4)[:3]  # kind of the page, its bytes before and after compression
    begin, end = claims[2]
    path = tmp_path / "x.parquet"
    path.write_bytes(whole[:begin] + varint(2**31 - 1) + whole[end:])
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory is counted anew
    before = status("VmHWM")
    with pytest.raises(pa.ArrowInvalid, match=r"x\.parquet: .*Page was smaller"):
        list(parquet.read(str(path), pa.schema([pa.field("uri", pa.string())])))
    assert status("VmHWM") - before < 2**26


@pytest.mark.parametrize("damage", ["header of a page", "text", "name of a column"])
def test_damage_in_what_is_read_back_is_named(damage: str, tmp_path: Path) -> None:
    whole = parquet_bytes({"uri": ["abcdef"] * 30}, use_dictionary=False)
    path = tmp_path / "x.parquet"
    path.write_bytes({
        "header of a page": whole[:4] + b"\xff" * 20 + whole[24:],
        "text": whole.replace(b"abcdef", b"abc\xffef"),
        "name of a column": whole.replace(b"uri", b"u\xffi"),
    }[damage])  # fmt: skip
    wanted = pa.schema([pa.field("uri", pa.string())])
    with pytest.raises(pa.ArrowInvalid):
        list(parquet.read(str(path), wanted))


def test_damaged_page_of_verdicts_is_an_error_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    columns: dict[str, Any] = {name: ["abcdef"] for name in verdicts.NEEDED}
    whole = parquet_bytes(columns, use_dictionary=False)
    path.write_bytes(whole[:4] + b"\xff" * 20 + whole[24:])
    with pytest.raises(SourceError, match=r"x\.parquet is not a readable Parquet file"):
        verdicts._from_file(str(path))
