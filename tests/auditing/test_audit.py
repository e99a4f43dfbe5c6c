"""The audit of a source: what it finds, in words and files, without Ray where everything is known already."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.auditing import audit as module
from jobs.auditing import duplicates, inventory, metadata_bias
from jobs.auditing.audit import audit, findings
from jobs.auditing.text import as_text, conclusion
from jobs.dataset import schema
from jobs.dataset.plan import write_manifest
from jobs.runs import catalog, products
from jobs.runs.publication import Run
from jobs.storage import parquet, reading, writing
from jobs.workflows.examine import FACTS_ID
from nsnet.errors import ConfigError, SourceError
from nsnet.images import decode
from nsnet.preparation import PreparationConfig, prepare
from nsnet.transforms import parse, to_file
from tests.support.tables import batches, image_file, put, read_rows, rows_file, run_command

Rows = list[dict[str, Any]]

HOSTILE = "\x1b[2J\x1b]0;owned\x07evil\n\r\x9b31m\u202e"


@pytest.fixture(autouse=True)
def small_forests(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they find is tested elsewhere."""
    monkeypatch.setattr(metadata_bias, "TREES", 5)
    monkeypatch.setattr(metadata_bias, "FOLDS", 3)


def image(number: int, label: int | None, generator: str | None, **values: Any) -> dict[str, Any]:
    """A row of `inventory.IMAGES`: generators and classes are of the same sizes, each image a file of its own."""
    width = 300 + 7 * (number // 2 % 50)
    unlike = int(np.random.default_rng(number).integers(2**63))
    known = {
        "uri": f"/{generator}/{number:04}.jpg", "label": label, "generator": generator, "width": width, "height": 300,
        "size_bytes": 30 * width, "format": "JPEG", "jpeg_quality": 90, "content_hash": str(number),
        "perceptual_hash": f"{unlike:016x}", "status": "scored",
    }  # fmt: skip
    return dict.fromkeys(inventory.IMAGES.names) | known | values


def failed(number: int, label: int | None, generator: str | None, error_class: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("width", "height", "format", "jpeg_quality", "perceptual_hash"))
    return image(number, label, generator, status="failed", error_class=error_class, **nothing)


def found(rows: Rows) -> tuple[dict[str, Any], pa.Table]:
    """The result of an audit of these rows, and the copies among them."""
    result, twins = findings(pa.Table.from_pylist(rows, schema=inventory.IMAGES))
    return {"source": "/source", "not_examined": 0, **result}, twins


def plain(generator: str, first: int, n: int = 40) -> Rows:
    """Real and fake images without a bias."""
    return [image(first + i, i % 2, generator) for i in range(n)]


def resized(generator: str, first: int, n: int = 40) -> Rows:
    """Likewise, but for the fakes' size."""
    return [
        {**row, "width": 512, "size_bytes": 30 * 512} if row["label"] else row for row in plain(generator, first, n)
    ]


# What is found.


def test_biased_generator_is_named_with_its_cause() -> None:
    result, _ = found([*plain("good", 0), *resized("bad", 100), *plain("fair", 200)])
    assert {name: group["metadata"]["biased"] for name, group in result["generators"].items()} == {
        "good": False, "bad": True, "fair": False
    }  # fmt: skip
    assert conclusion(result) == "1 of 3 generators are separable by metadata alone: bad (size)"
    assert as_text(result).splitlines()[-1] == conclusion(result)
    alone, _ = found(resized("bad", 100))
    assert conclusion(alone) == "1 of 1 generators are separable by metadata alone: bad (size)"
    assert alone["everything"]["metadata"]["biased"] is True


def test_generators_that_cannot_be_judged_are_said_with_the_reason() -> None:
    alone = [image(i, 1, "alone") for i in range(30)]
    few = [image(100 + i, i % 2, "few") for i in range(18)]
    result, _ = found([*alone, *few, *[image(200 + i, None, None) for i in range(5)]])
    assert conclusion(result).startswith("0 of 0 generators are separable by metadata alone; 3 cannot be judged")
    lines = as_text(result).splitlines()
    assert "–: one class only: alone" in lines
    assert "–: fewer than 10 different images of a class: few" in lines
    assert "–: no image with a label: (none)" in lines
    (line,) = [line for line in lines if line.startswith("alone ") and " fake " not in line]
    assert line.split()[1:] == ["0", "30", *"–" * 9]


def test_fakes_of_a_benchmark_are_compared_with_the_reals_that_it_pairs_them_with() -> None:
    reals = [image(i, 0, "laion") for i in range(40)]
    unlike = [image(100 + i, 1, "ldm_200", format="PNG", jpeg_quality=None) for i in range(40)]
    alike = [image(200 + i, 1, "glide_100_10") for i in range(40)]
    own = plain("dalle", 300)
    result, _ = found([*reals, *unlike, *alike, *own])
    metadata = {name: group["metadata"] for name, group in result["generators"].items()}
    assert {name: group["reals_of"] for name, group in result["generators"].items()} == {
        "laion": None, "ldm_200": "laion", "glide_100_10": "laion", "dalle": None
    }  # fmt: skip
    assert metadata["ldm_200"]["biased"] and [metadata["ldm_200"][name] for name in ("real", "fake")] == [40, 40]
    assert metadata["glide_100_10"]["biased"] is False and metadata["dalle"]["real"] == 20
    assert [*result["generators"]["ldm_200"]["classes"]] == ["fake"]  # what it holds is its own
    assert conclusion(result).startswith("1 of 3 generators are separable by metadata alone: ldm_200 (format")
    assert "compared with the reals of laion, as its benchmark does: glide_100_10, ldm_200" in as_text(result)


def test_bias_between_generators_that_no_generator_has_is_said() -> None:
    reals = [image(i, 0, "camera") for i in range(30)]
    fakes = [image(100 + i, 1, "model", format="WEBP", jpeg_quality=None) for i in range(30)]
    result, _ = found([*reals, *fakes])
    assert conclusion(result) == (
        "0 of 0 generators are separable by metadata alone; 2 cannot be judged; all together, real and fake are "
        "separable by metadata alone (format)"
    )


def test_copies_across_splits_and_labels_are_shown() -> None:
    rows = plain("g", 0)
    for row in rows:
        row["split"] = "train" if int(row["content_hash"]) < 30 else "test"
    rows[31] |= {"content_hash": "1"}  # both fake
    rows[2] |= {"perceptual_hash": rows[5]["perceptual_hash"]}  # real and fake, both training
    result, twins = found(rows)
    shown = result["duplicates"]
    assert (shown["exact"]["groups"], shown["alike"]["groups"]) == (1, 2)
    assert shown["alike"]["across_splits"] == {
        "groups": 1, "pictures": 2, "by_split": {"test": 1, "train": 1}, "examples": [["/g/0001.jpg", "/g/0031.jpg"]]
    }  # fmt: skip
    assert shown["alike"]["across_labels"]["examples"] == [["/g/0002.jpg", "/g/0005.jpg"]]
    assert shown["exact"]["across_labels"]["groups"] == 0
    assert twins.column("kind").to_pylist() == ["exact", "exact", "near", "near"]
    lines = as_text(result).splitlines()
    assert "test: 1 images have a copy in another split" in lines
    assert "  in two splits: /g/0001.jpg and /g/0031.jpg" in lines
    assert "  real and fake: /g/0002.jpg and /g/0005.jpg" in lines
    assert any(line.split() == ["train", "g", "15", "15", "0"] for line in lines)
    assert any(line.split()[:4] == ["equal", "files", "1", "2"] for line in lines)


# Aligned files.


def file_of(number: int, file_format: str, **options: Any) -> bytes:
    """A file of smooth colours, as photographs have them, which compress alike before and after a first compression."""
    coarse = Image.fromarray(np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((64, 48), Image.Resampling.BICUBIC).save(buffer, file_format, **options)
    return buffer.getvalue()


def planted(chain: str | None, n: int = 60) -> Rows:
    """Facts of real JPEG and fake PNG files of like contents, as they are or under an alignment, by encoding them."""
    rows = []
    for number in range(n):
        label = number % 2
        file = file_of(number, "PNG") if label else file_of(number, "JPEG", quality=96)
        prepared = prepare(file, PreparationConfig(patches=(), aligned=True), chain or "")
        rows.append(
            image(
                number, label, "planted", transform=chain, format=prepared.format, jpeg_quality=prepared.quality,
                width=prepared.width, height=prepared.height, size_bytes=prepared.size_bytes or len(file),
            )
        )  # fmt: skip
    return rows


def test_format_that_tells_the_label_no_longer_does_when_all_files_are_encoded_alike() -> None:
    result, twins = found([*planted(None), *planted("jpeg:50")])
    raw, aligned = (part["generators"]["planted"]["metadata"] for part in (result, result["alignment"]))
    assert raw["auroc"] == 1 and raw["biased"] and raw["single"]["format"] == 1
    assert 0.2 < aligned["auroc"] < 0.8 and not aligned["biased"]
    assert aligned["single"]["format"] == aligned["single"]["JPEG quality"] == 0.5
    assert result["pictures"] == 60 and twins.num_rows == 0  # an aligned file is no image more, and no copy
    assert result["alignment"]["generators"]["planted"]["classes"]["fake"]["formats"] == {"JPEG": 30}
    assert conclusion(result) == (
        "1 of 1 generators are separable by metadata alone: planted (format, bytes per pixel); after jpeg:50: "
        "0 of 1 generators are separable by metadata alone"
    )
    (line,) = [line for line in as_text(result).split("\n\n")[-2].splitlines() if line.startswith("planted")]
    assert line.split()[1:4:2] == ["1.00", f"{aligned['auroc']:.2f}"]


def test_alignment_of_lossless_files_leaves_the_quality_of_the_others() -> None:
    """The reals have a quality of 96 and stay as they are: fakes of another quality are told by it."""
    aligned = found([*planted(None), *planted("lossless:jpeg:80")])[0]["alignment"]["generators"]["planted"]
    assert aligned["metadata"]["single"]["format"] == 0.5 and aligned["metadata"]["single"]["JPEG quality"] == 1
    assert aligned["classes"]["real"]["jpeg_quality"] == [96, 96, 96]


def test_aligned_files_that_failed_or_are_missing_are_said() -> None:
    aligned = planted("jpeg:96")[:-2]
    aligned[0] = failed(0, 0, "planted", "ImageTooLargeError") | {"transform": "jpeg:96"}
    gone = {**planted("jpeg:96")[-1], "uri": "/planted/gone.jpg"}
    result, _ = found([*planted(None), *aligned, gone])
    assert result["alignment"]["not_examined"] == 2 and not result["failed"]
    measured = result["alignment"]["generators"]["planted"]["metadata"]
    assert (measured["real"], measured["fake"]) == (28, 29)
    text = as_text(result)
    assert "failed with ImageTooLargeError: 1, such as /planted/0000.jpg" in text
    assert "2 images were not examined under it and are not counted in it" in text


def test_failed_and_unlabelled_images_are_counted_and_in_no_other_number() -> None:
    rows = [*plain("g", 0), *resized("h", 100)]
    more = [failed(300 + i, i % 2, "g", "ImageCorruptError") for i in range(3)]
    more += [failed(310, 1, "h", "FetchError"), failed(311, 1, "h", "FetchError") | {"content_hash": "310"}]
    more += [image(400 + i, None, "g") for i in range(4)]
    result, _ = found([*rows, *more])
    before, _ = found(rows)
    for name in ("g", "h"):
        assert result["generators"][name]["metadata"] == before["generators"][name]["metadata"]
    assert result["duplicates"]["exact"]["groups"] == 0
    assert result["pictures"] == 89
    assert result["failed"] == {
        "ImageCorruptError": {"pictures": 3, "example": "/g/0300.jpg"},
        "FetchError": {"pictures": 2, "example": "/h/0310.jpg"},
    }
    lines = as_text(result).splitlines()
    assert lines[0] == "89 images of /source: 42 real, 43 fake, 4 unlabelled, 5 failed"
    assert lines[1] == "  failed with ImageCorruptError: 3, such as /g/0300.jpg"


def test_source_of_failures_only_has_a_report() -> None:
    result, twins = found([failed(i, i % 2, "g", "ImageEmptyError") for i in range(4)])
    assert conclusion(result) == "0 of 0 generators are separable by metadata alone; 1 cannot be judged"
    assert twins.num_rows == 0 and "–" in as_text(result)
    nothing, _ = found([])
    assert nothing["generators"] == {} and as_text(nothing).endswith(
        "0 of 0 generators are separable by metadata alone"
    )


def test_numbers_of_a_generator_do_not_depend_on_the_others() -> None:
    own = resized("h", 100)
    alone, _ = found(own)
    beside, _ = found([*plain("a", 0), *own, *plain("z", 200)])
    assert alone["generators"]["h"] == beside["generators"]["h"]


def test_names_from_a_source_are_harmless_and_short() -> None:
    name, long = HOSTILE, "long" * 1000
    rows = [*resized(name, 0), *plain(long, 100), failed(300, 1, name, HOSTILE)]
    rows = [
        row | {"split": HOSTILE + str(i % 2), "content_hash": str(i % 60), "format": HOSTILE}
        for i, row in enumerate(rows)
    ]
    result, _ = found(rows)
    assert set(result["generators"]) == {name, long}
    text = as_text(result)
    assert "evil" in text and all(letter.isprintable() or letter == "\n" for letter in text)
    assert max(len(line) for line in text.splitlines() if "/long" not in line) < 400


# The command, without Ray: there is nothing to look at.


def publish(source: str, out: str, failing: str = "", align: str = "") -> None:
    """Facts of all images of a source, as `examine` publishes them; images whose URI has this in it failed."""
    run = Run(out=out, product=products.FACTS)
    manifest, staged = f"{run.staging}/manifest.parquet", rows_file(f"{run.staging}/attempt-00000001")
    write_manifest(source, manifest, transforms=("", align) if align else ())
    rows = []
    for row in read_rows(manifest):
        number = int(Path(row["uri"]).stem)
        made = image(number, row["label"], row["generator"])
        if failing and failing in row["uri"]:
            made = failed(number, row["label"], row["generator"], "ImageCorruptError")
        own = {key: row[key] for key in ("image_id", "uri", "split", "transform")}
        rows.append(dict.fromkeys(schema.FACTS.names) | made | own)
    parquet.write(batches(rows, schema.FACTS), schema.FACTS, staged)
    run.publish(manifest, [staged], {"facts_id": FACTS_ID})


@pytest.fixture
def source(tmp_path: Path) -> str:
    names = [f"g/{label}/{2 * i + n:04}.jpg" for i in range(15) for n, label in enumerate(("0_real", "1_fake"))]
    return put(str(tmp_path / "pictures"), dict.fromkeys(names, b"picture"))


def test_result_is_printed_and_stored(no_cluster: None, source: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    publish(source, out)
    code, printed, _ = run_command("audit", source, "--out", out)
    assert code == 0 and printed == (tmp_path / "out" / module.REPORT_FILE).read_text()
    text = (tmp_path / "out" / module.AUDIT_FILE).read_text()
    result = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert as_text(result) + "\n" == printed
    assert (result["source"], result["pictures"], result["not_examined"]) == (source, 30, 0)
    assert pq.read_table(tmp_path / "out" / module.COPIES_FILE) == duplicates.COPIES.empty_table()


def test_aligned_facts_are_shown_beside_the_others_where_they_are_asked_for(
    no_cluster: None, source: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    publish(source, out, align="jpeg:96")
    code, printed, _ = run_command("audit", source, "--out", out, "--align", "jpeg:96")
    assert code == 0 and "the same for the files that jpeg:96 makes of the images" in printed
    result = json.loads((tmp_path / "out" / module.AUDIT_FILE).read_text())
    assert result["alignment"]["generators"]["g"]["metadata"] == result["generators"]["g"]["metadata"]  # equal facts
    assert (result["pictures"], result["not_examined"], result["alignment"]["not_examined"]) == (30, 0, 0)
    code, printed, _ = run_command("audit", source, "--out", out)
    assert code == 0 and "jpeg:96" not in printed
    assert json.loads((tmp_path / "out" / module.AUDIT_FILE).read_text()) == result | {"alignment": None}


def test_failures_of_an_alignment_count_for_the_exit_code(
    no_cluster: None, monkeypatch: pytest.MonkeyPatch, source: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    publish(source, out, align="jpeg:96")
    read = module._images

    def failing(*arguments: Any, **options: Any) -> tuple[pa.Table, int]:
        table, unknown = read(*arguments, **options)
        rows = table.to_pylist()
        for row in rows:
            if row["transform"] and row["label"]:
                row |= {"status": "failed", "error_class": "ImageTooLargeError"}
        return pa.Table.from_pylist(rows, schema=inventory.IMAGES), unknown

    monkeypatch.setattr(module, "_images", failing)
    code, printed, _ = run_command("audit", source, "--out", out, "--align", "jpeg:96")
    assert code == 3 and "failed with ImageTooLargeError: 15, such as" in printed


@pytest.mark.parametrize("text", ["resize", "jpeg:0", "swirl:3", "resize:0.5", ""])
def test_chain_that_is_no_alignment_is_wrong_usage(no_cluster: None, source: str, tmp_path: Path, text: str) -> None:
    code, printed, log = run_command("audit", source, "--out", str(tmp_path / "out"), "--align", text)
    assert (code, printed) == (2, "") and len(log.splitlines()) == 1 and "--align" in log
    assert not (tmp_path / "out").exists()


def test_images_that_are_gone_or_new_are_in_no_number(no_cluster: None, source: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    publish(source, out)
    writing.remove_file(f"{source}/g/1_fake/0001.jpg")
    assert audit(source, out=out)["generators"]["g"]["metadata"]["fake"] == 14
    # what an earlier run left out is new to this one, unless it is not asked for
    put(source, {"h/1_fake/9999.jpg": b"new"})
    result = audit(source, out=out, selection=module.Selection(include=("g/*",)))
    assert (result["pictures"], result["not_examined"], list(result["generators"])) == (29, 0, ["g"])


def test_images_that_were_not_looked_at_are_said(monkeypatch: pytest.MonkeyPatch, source: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    publish(source, out)
    put(source, {"h/1_fake/9999.jpg": b"new"})
    record = {"left_out": {}, "unread": [], "unread_count": 0}
    monkeypatch.setattr(module, "examine", lambda *_, **__: record)  # as if it came between its listing and ours
    result = audit(source, out=out)
    assert (result["pictures"], result["not_examined"]) == (30, 1)
    assert "  1 more were not examined and are not counted below" in as_text(result)


@pytest.mark.parametrize(("allowed", "code"), [("1%", 3), ("50%", 0)])
def test_more_failures_than_allowed_are_exit_code_3(
    no_cluster: None, source: str, tmp_path: Path, allowed: str, code: int
) -> None:
    out = str(tmp_path / "out")
    publish(source, out, failing="/1_fake/")
    ended, printed, log = run_command("audit", source, "--out", out, "--max-failed", allowed)
    assert ended == code and "failed with ImageCorruptError: 15, such as" in printed
    assert ("15 of 30 images failed" in log) == (code == 3)


@pytest.mark.parametrize(("allowed", "code"), [("0", 3), ("1", 0)])
def test_containers_that_cannot_be_read_are_exit_code_3_though_there_is_nothing_to_do(
    no_cluster: None, source: str, tmp_path: Path, allowed: str, code: int
) -> None:
    out = str(tmp_path / "out")
    publish(source, out)
    put(source, {"cut.tar": b"no tar" * 200, "notes.txt": b"x"})
    ended, _, log = run_command("audit", source, "--out", out, "--max-left-out", allowed)
    assert ended == code
    assert ("1 folders or containers of the source could not be read, more than the allowed" in log) == (code == 3)
    (record,) = (found for found in catalog.runs(out, products.FACTS) if not found["rows"])  # both may be of one second
    assert record["unread_count"] == 1 and f"{source}/cut.tar" in record["unread"][0]
    assert record["left_out"] == {".tar that cannot be read": 1, ".txt is no picture": 1}
    assert reading.read_json(f"{out}/{module.AUDIT_FILE}")["unread"] == record["unread"]


@pytest.mark.parametrize("wrong", [{"distance": 64}, {"distance": -1}, {"seed": -1}, {"seed": 2**32}])
def test_settings_out_of_range_are_refused_before_anything_is_listed(
    no_cluster: None, source: str, tmp_path: Path, wrong: dict[str, int]
) -> None:
    with pytest.raises(ConfigError, match="--distance must be 0 to 63 bits and --seed 0 to 4294967295"):
        audit(source, out=str(tmp_path / "out"), **wrong)
    assert not (tmp_path / "out").exists()


def test_missing_and_empty_sources_are_said(no_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        with pytest.raises(SourceError):
            audit(str(tmp_path / name))


# The whole way.


@pytest.mark.long  # two runs on a cluster; the tests above check each finding, and trainings examine their sources
def test_images_are_examined_once_and_their_bias_is_found(cluster: None, tmp_path: Path) -> None:
    files = {}
    for i in range(12):
        files[f"g/0_real/{i}.jpg"] = image_file(i, "JPEG", 56 + i, 40, quality=90)
        files[f"g/1_fake/{i}.png"] = image_file(100 + i, "PNG", 56 + i, 40)
    files["g/0_real/again.jpg"] = files["g/1_fake/again.jpg"] = files["g/0_real/0.jpg"]
    files["g/0_real/broken.jpg"] = files["g/0_real/1.jpg"][:300]
    source, out = put(str(tmp_path / "pictures"), files), str(tmp_path / "out")
    code, printed, _ = run_command("audit", source, "--out", out, "--max-failed", "5%")
    assert code == 0
    assert printed.splitlines()[0] == f"27 images of {source}: 14 real, 13 fake, 1 failed"
    assert printed.splitlines()[-1].startswith("1 of 1 generators are separable by metadata alone: g (")
    result = reading.read_json(f"{out}/{module.AUDIT_FILE}")
    assert result["duplicates"]["exact"]["across_labels"]["groups"] == 1
    assert result["generators"]["g"]["classes"]["real"]["jpeg_quality"] == [90, 90, 90]
    assert set(result["generators"]["g"]["metadata"]["told_by"]) == {"format", "bytes per pixel"}
    assert {row["kind"] for row in read_rows(f"{out}/{module.COPIES_FILE}")} == {"exact"}
    assert len(catalog.runs(out, products.FACTS)) == 1
    again, reprinted, _ = run_command("audit", source, "--out", out, "--max-failed", "5%")
    assert (again, reprinted) == (0, printed)
    assert [record["rows"] for record in catalog.runs(out, products.FACTS)] == [27, 0]


@pytest.mark.long  # a run on a cluster
def test_aligned_files_are_made_and_measured_on_the_cluster(cluster: None, tmp_path: Path) -> None:
    files = {f"g/0_real/{i}.jpg": file_of(i, "JPEG", quality=96) for i in range(12)}
    files |= {f"g/1_fake/{i}.png": file_of(100 + i, "PNG") for i in range(12)}
    source, out = put(str(tmp_path / "pictures"), files), str(tmp_path / "out")
    for place in (("--out", out), ()):  # with and without a place for the facts
        code, printed, _ = run_command("audit", source, *place, "--align", "centre:32+jpeg:50")
        assert code == 0
        start = "1 of 1 generators are separable by metadata alone: g (format"
        assert printed.splitlines()[-1].startswith(start)
        assert printed.splitlines()[-1].endswith(
            "after centre:32+jpeg:50: 0 of 1 generators are separable by metadata alone"
        )
    columns = ("uri", "format", "width", "size_bytes", "transform")
    facts = pa.Table.from_batches(
        catalog.published(out, pa.schema([schema.FACTS.field(n) for n in columns]), products.FACTS)
    )
    rows = {(row["uri"], row["transform"]): row for row in facts.to_pylist()}
    assert len(rows) == 48
    for name, data in files.items():
        raw, aligned = (rows[f"{source}/{name}", chain] for chain in (None, "centre:32+jpeg:50"))
        assert (raw["size_bytes"], raw["width"]) == (len(data), 64)
        made = to_file(decode(data), parse("centre:32+jpeg:50"), seed=0, max_pixels=10**6)
        assert (aligned["format"], aligned["width"], aligned["size_bytes"]) == ("JPEG", 32, len(made))
