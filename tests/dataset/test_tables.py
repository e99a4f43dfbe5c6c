"""Columns of Parquet files: where images, labels and names are found, whatever wrote the file. Costs 4 s."""

import datetime
import json
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.dataset import containers, fetching
from jobs.dataset.source import Source
from nsnet.errors import FetchError, ImageTooLargeError, SourceError
from tests.dataset.test_labels import DAMAGED
from tests.fuzz.thrift import varint, varints
from tests.support.tables import image_file, parquet_bytes, put

PLAIN: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
IMAGES = [image_file(seed) for seed in range(3)]


def struct(images: list[bytes | None]) -> pa.Array:
    """Images as `datasets` stores them."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [{"bytes": image, "path": None if image is None else f"{i}.png"} for i, image in enumerate(images)]
    return pa.array(rows, kind)


def features(**columns: Any) -> dict[str, str]:
    return {"huggingface": json.dumps({"info": {"features": columns}})}


def class_label(*names: str) -> dict[str, Any]:
    return {"_type": "ClassLabel", "names": names}


def with_rows(content: bytes, before: int, said: int) -> bytes:
    """A Parquet file whose footer says another number of rows; its row groups keep theirs."""
    length = int.from_bytes(content[-8:-4], "little")
    pages, footer = content[: -8 - length], content[-8 - length : -8]
    at, end = next(span for span in varints(footer) if footer[slice(*span)] == varint(before))
    footer = footer[:at] + varint(said) + footer[end:]
    return pages + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def rows_of(place: Path, content: bytes, **columns: str) -> list[dict[str, Any]]:
    put(str(place), {"x.parquet": content})
    return list(Source(str(place / "x.parquet"), columns=columns).rows())


def images_of(rows: list[dict[str, Any]]) -> list[bytes]:
    return [fetching.fetch(row, 10**6).data for row in rows]


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    fetching.close()


@pytest.mark.parametrize(
    "columns",
    [
        {"bytes": IMAGES},
        {"image": IMAGES},
        {"jpg": pa.array(IMAGES, pa.large_binary())},
        {"content": IMAGES, "path": ["a", "b", "c"]},
        {"Image": IMAGES},
        {"image": struct(IMAGES), "text": ["a", "b", "c"]},
        {"image": ["a", "b", "c"], "jpg": IMAGES},
        {"bytes": pa.array(IMAGES).dictionary_encode()},
    ],
    ids=lambda columns: ", ".join(columns),
)
def test_stored_images_are_found_by_name_and_type(columns: dict[str, Any], tmp_path: Path) -> None:
    rows = rows_of(tmp_path, parquet_bytes(columns))
    assert images_of(rows) == IMAGES
    assert [row["uri"] for row in rows] == [f"{tmp_path}/x.parquet#{i}" for i in range(3)]


def test_column_of_any_name_can_be_named(tmp_path: Path) -> None:
    content = parquet_bytes({"pixels": IMAGES, "thumb": [b"t"] * 3, "is_ai": [0, 1, 0], "model": ["m", None, "n"]})
    with pytest.raises(SourceError, match=r"only is_ai \(int64\), .* pixels \(binary\).*: name it with --column image"):
        rows_of(tmp_path, content)
    rows = rows_of(tmp_path, content, image="pixels", label="is_ai", generator="model")
    assert images_of(rows) == IMAGES
    assert [(row["label"], row["generator"]) for row in rows] == [(0, "m"), (1, None), (0, "n")]


def test_list_with_thumbnails_beside_is_a_list_unless_it_is_said(tmp_path: Path) -> None:
    put(str(tmp_path), {"a.png": IMAGES[0]})
    content = parquet_bytes({"uri": ["a.png"], "image": [IMAGES[1]]})
    assert images_of(rows_of(tmp_path, content)) == [IMAGES[0]]
    assert images_of(rows_of(tmp_path, content, image="image")) == [IMAGES[1]]


def test_row_without_an_image_is_empty(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, parquet_bytes({"image": struct([IMAGES[0], None, IMAGES[2]])}))
    assert images_of(rows) == [IMAGES[0], b"", IMAGES[2]]
    rows = rows_of(tmp_path, parquet_bytes({"image": pa.array([None, {"bytes": IMAGES[0], "path": None}])}))
    assert images_of(rows) == [b"", IMAGES[0]]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("fake", "real"), [1, 0, 1]),
        (("real", "fake"), [0, 1, 0]),
        (("human", "AI"), [0, 1, 0]),
        (("cat", "dog"), [None] * 3),
        (("real", "sdxl"), [0, None, 0]),
    ],
)
def test_labels_mean_what_the_schema_calls_them(
    names: tuple[str, str], expected: list[int | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = parquet_bytes({"bytes": IMAGES, "label": [0, 1, 0]}, features(label=class_label(*names)))
    assert [row["label"] for row in rows_of(tmp_path, content)] == expected
    assert ("are neither real nor fake" in capsys.readouterr().err) == (None in expected)


@pytest.mark.parametrize("metadata", DAMAGED, ids=lambda metadata: metadata[:70].decode("latin-1"))
def test_numbers_are_no_labels_if_the_names_of_their_classes_cannot_be_read(
    metadata: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may stand for the opposite. Words say what they mean."""
    rows = rows_of(tmp_path, parquet_bytes({"bytes": IMAGES, "label": [0, 1, 0]}, {"huggingface": metadata}))
    assert [row["label"] for row in rows] == [None] * 3 and images_of(rows) == IMAGES
    assert "numbers in `label` are not used as labels\n" in capsys.readouterr().err
    words = parquet_bytes({"bytes": IMAGES, "label": ["real", "fake", "real"]}, {"huggingface": metadata})
    assert [row["label"] for row in rows_of(tmp_path, words)] == [0, 1, 0]


@pytest.mark.parametrize("column", ["label", "generator", "split", "uri"])
@pytest.mark.parametrize(
    "values",
    [[["a"]] * 3, [{"name": "real"}] * 3, [datetime.date(2026, 1, 1)] * 3, pa.array([2**52] * 3, pa.timestamp("ms"))],
)
def test_column_of_a_type_that_is_not_read_costs_no_image(
    column: str, values: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(tmp_path, parquet_bytes({"image": IMAGES, column: values}))
    assert images_of(rows) == IMAGES and [row["label"] for row in rows] == [None] * 3
    assert f"its column `{column}` is of type" in capsys.readouterr().err


def test_classes_are_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = parquet_bytes({"bytes": IMAGES, "label": [0, 1, 7]})
    assert [row["label"] for row in rows_of(tmp_path, content)] == [None] * 3
    assert "they are not used as labels" in capsys.readouterr().err


def test_column_that_differs_in_case_is_found_where_it_is_the_only_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [row["label"] for row in rows_of(tmp_path, parquet_bytes({"bytes": IMAGES, "LABEL": [0, 1, 0]}))] == [
        0,
        1,
        0,
    ]
    content = parquet_bytes({"bytes": IMAGES, "Label": [1, 1, 1], "LABEL": [0, 1, 0]})
    assert [row["label"] for row in rows_of(tmp_path, content)] == [None] * 3
    assert "several columns are called 'label': none of them is used" in capsys.readouterr().err
    content = parquet_bytes({"bytes": IMAGES, "label": [1, 1, 1], "LABEL": [0, 1, 0]})
    assert [row["label"] for row in rows_of(tmp_path, content)] == [1, 1, 1]


def test_columns_of_one_name_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pa.Table.from_arrays(
        [pa.array(IMAGES), pa.array([0, 1, 0]), pa.array([1, 1, 1])], ["bytes", "label", "label"]
    )
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink)
    assert [row["label"] for row in rows_of(tmp_path, bytes(sink.getvalue()))] == [None] * 3
    assert "several columns are called 'label'" in capsys.readouterr().err


def test_generator_is_found_under_its_other_name(tmp_path: Path) -> None:
    content = parquet_bytes({"bytes": IMAGES, "model_name": ["sdxl", "", None]})
    assert [row["generator"] for row in rows_of(tmp_path, content)] == ["sdxl", None, None]


def test_part_in_partition_folders_has_what_they_say_and_its_columns_do_not(tmp_path: Path) -> None:
    parts = {
        "data.parquet/_SUCCESS": b"",
        "data.parquet/fake/part-0.parquet": parquet_bytes({"bytes": IMAGES[:1]}),
        "data.parquet/real/part-0.parquet": parquet_bytes({"bytes": IMAGES[1:2], "label": [1], "generator": ["g"]}),
    }
    put(str(tmp_path), parts)
    found = {row["uri"].partition("data.parquet/")[2]: row for row in Source(str(tmp_path / "data.parquet")).rows()}
    assert {name: row["label"] for name, row in found.items()} == {
        "fake/part-0.parquet#0": 1, "real/part-0.parquet#0": 1,
    }  # fmt: skip
    assert found["real/part-0.parquet#0"]["generator"] == "g"


@pytest.mark.parametrize("name", ["bytes", "image.bytes", "raw_bytes", "path"])
def test_struct_holds_images_only_in_a_field_of_bytes(name: str, tmp_path: Path) -> None:
    """Read as one that does, a struct with a text of that name would mix up the answers of its reader."""
    inner = pa.string() if name == "bytes" else pa.binary()
    kind = pa.struct({"other": pa.binary(), name: inner, "deep": pa.struct({"bytes": pa.binary()})})
    with pytest.raises(SourceError, match="has neither a `uri` column nor an image column"):
        rows_of(tmp_path, parquet_bytes({"image": pa.nulls(3, kind)}))


def test_struct_of_many_fields_is_found_to_hold_images(tmp_path: Path) -> None:
    content = parquet_bytes({"image": [{**dict.fromkeys(map(str, range(90)), "x"), "bytes": one} for one in IMAGES]})
    assert images_of(rows_of(tmp_path, content)) == IMAGES


def test_table_of_thousands_of_columns_is_described_in_parts(tmp_path: Path) -> None:
    columns = {"bytes": IMAGES[:1], **{f"{'a long name of a feature ' * 9}{i}": [0] for i in range(3000)}}
    assert images_of(rows_of(tmp_path, parquet_bytes(columns, write_statistics=False))) == IMAGES[:1]


# What it may cost.


@pytest.mark.parametrize("said", [0, 2, 400, -1])
@pytest.mark.parametrize("columns", [{"bytes": [b"x"] * 37}, {"bytes": [b"x"] * 37, "label": [0] * 37}], ids=["1", "2"])
def test_number_of_rows_that_the_groups_do_not_have_is_refused(
    said: int, columns: dict[str, Any], tmp_path: Path
) -> None:
    """Fewer would pass over images unseen, more would be rows of nothing."""
    content = with_rows(parquet_bytes(columns), 37, said)
    with pytest.raises(SourceError, match=rf"declares {said} rows, but its row groups declare 37"):
        rows_of(tmp_path, content)


def test_rows_that_a_reader_was_not_asked_for_stop_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    container = containers.Container("x.parquet", "parquet", 1000, lambda offset, length: b"")
    answers: Any = ({"values": [["a"], ["b"]]} for _ in range(10))
    monkeypatch.setattr(container, "_ask", lambda request, rows: answers)
    with pytest.raises(containers.ContainerError, match="it declares 3 rows, but has more"):
        list(container.rows(["uri"], 3))
    assert len(list(answers)) == 8


@pytest.mark.parametrize(("column", "kind", "verb"), [("uri", pa.string(), "list"), ("bytes", pa.binary(), "hold")])
def test_more_rows_than_a_file_can_name_are_refused(column: str, kind: pa.DataType, verb: str, tmp_path: Path) -> None:
    """Nulls take no room: a few KB may say that they list millions of images."""
    content = parquet_bytes({column: pa.nulls(200_000, kind)}, **PLAIN)
    with pytest.raises(SourceError, match=rf"claims to {verb} 200,000 images in [0-9,]+ bytes, which is impossible"):
        rows_of(tmp_path, content)


def test_long_texts_that_are_stored_once_stop_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file that unfolds to many times its size, by texts that are short enough each."""
    monkeypatch.setattr(containers, "MIN_TEXTS_BYTES", 2**22)
    count = 2**22 // 8000 + 2
    often = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array(["/" + "x" * 8000]))
    content = parquet_bytes({"uri": often}, store_schema=False)
    assert len(content) * containers.MAX_RATIO < 2**22
    with pytest.raises(SourceError, match=r"bytes hold more than 4,194,304 bytes of texts"):
        rows_of(tmp_path, content)


def test_row_group_that_cannot_be_read_costs_itself_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are read one through the other: to try that for each could take all night."""
    forks: list[Any] = []
    fork = containers._zygote.fork
    monkeypatch.setattr(containers._zygote, "fork", lambda *given: (forks.append(given), fork(*given))[1])
    images = [image_file(seed, width=16, height=16) for seed in range(60)]
    content = parquet_bytes({"bytes": images}, row_group_size=20, compression="none", use_dictionary=False)
    at = content.index(images[25][:60]) - 4  # the length of an image of the second group
    rows = rows_of(tmp_path, content[:at] + b"\xff\xff\xff\x7f" + content[at + 4 :])
    forks.clear()
    found: list[bytes | None] = []
    for row in rows:
        try:
            found.append(fetching.fetch(row, 10**6).data)
        except FetchError as error:
            assert "x.parquet is not a complete Parquet file" in str(error)
            found.append(None)
    lost = [i for i, one in enumerate(found) if one is None]
    assert lost == list(range(lost[0], 40)) and 20 <= lost[0] <= 25
    assert [one for one in found if one] == [one for i, one in enumerate(images) if i not in lost]
    assert len(forks) == 2  # the first one, and the one after the failure


def test_reader_that_the_machine_ends_costs_no_image(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, parquet_bytes({"bytes": IMAGES}, row_group_size=1))
    found = []
    for row in rows:
        found.append(fetching.fetch(row, 10**6).data)
        (stored,) = fetching._opened.values()
        assert stored._container._child is not None
        os.kill(stored._container._child.pid, signal.SIGKILL)
    assert found == IMAGES and not fetching._unreadable


def test_reader_that_the_machine_kills_twice_costs_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(tmp_path, parquet_bytes({"bytes": [image_file(seed, width=16, height=16) for seed in range(20)]}))
    ask, kills = containers.Container._ask, [1, 2]

    def killing(self: containers.Container, request: dict[str, Any], rows: int = 0) -> Any:
        if "images" in request and kills:
            kills.pop()
            assert self._child is not None
            os.kill(self._child.pid, signal.SIGKILL)
        return ask(self, request, rows)

    monkeypatch.setattr(containers.Container, "_ask", killing)
    with pytest.raises(FetchError, match="its reader ended with SIGKILL"):
        fetching.fetch(rows[0], 10**6)
    assert all(fetching.fetch(row, 10**6).data for row in rows)


def test_image_that_unfolds_beyond_its_file_is_refused_in_its_own_process(tmp_path: Path) -> None:
    """20 KB of Parquet with one image of 600 MB, of zeros."""
    put(str(tmp_path), {"x.parquet": parquet_bytes({"bytes": [bytes(600_000_000)]}, **PLAIN)})
    assert os.path.getsize(tmp_path / "x.parquet") < 100_000
    (row,) = Source(str(tmp_path / "x.parquet")).rows()
    with pytest.raises(ImageTooLargeError, match="x.parquet: reading it exceeds the memory limit"):
        fetching.fetch(row, 10**6)
