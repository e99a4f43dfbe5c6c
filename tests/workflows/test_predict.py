"""`nsnet predict`: the detector's verdicts on the command line, in order, whatever the files and their names hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from nsnet.detector import Detector, Verdict
from tests.support.credentials import picture, signed, signer
from tests.support.swift import SwiftServer
from tests.support.tables import image_file, new_bucket, put, run_command, save_bundle

REPO_ROOT = Path(__file__).parents[2]
FILES = {
    "a.png": image_file(1),
    "cut.png": image_file(2, "PNG", 80, 80)[:3000],
    "ü 图.jpg": image_file(3, "JPEG", 90, 70),
    "text.png": b"no image",
    "empty.png": b"",
    "b.webp": image_file(4, "WEBP"),
}
GOOD = ["a.png", "ü 图.jpg", "b.webp"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_bundle(tmp_path_factory.mktemp("detector")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return put(str(tmp_path_factory.mktemp("pictures")), FILES)


@pytest.fixture(scope="module")
def expected(bundle: str) -> dict[str, Verdict]:
    return dict(zip(GOOD, Detector.load(bundle).predict([FILES[name] for name in GOOD]), strict=True))


def predict(bundle: str, *arguments: str) -> tuple[int, list[str], str]:
    code, out, err = run_command("predict", "--detector", bundle, "--device", "cpu", *arguments)
    return code, out.splitlines(), err


def test_verdicts_are_those_of_the_detector_in_the_order_asked(
    bundle: str, folder: str, expected: dict[str, Verdict]
) -> None:
    names = ["b.webp", "a.png", "ü 图.jpg", "a.png"]
    code, lines, err = predict(bundle, *(f"{folder}/{name}" for name in names))
    assert code == 0 and err == "" and len(lines) == 2 * len(names)
    for name, first, second in zip(names, lines[::2], lines[1::2], strict=True):
        verdict = expected[name]
        said = f"{verdict.verdict}, P(fake) = {verdict.prob_fake:.3f} (threshold {verdict.threshold:.3f})"
        assert first == f"{folder}/{name}: {said}"
        assert f"{verdict.width} × {verdict.height} px {verdict.format}" in second
        assert f"“{verdict.caption}”" in second and f"{verdict.residual_energy:.0%}" in second
    assert len({verdict.prob_fake for verdict in expected.values()}) == len(GOOD)


def test_images_that_cannot_be_judged_are_lines_in_their_place(bundle: str, folder: str) -> None:
    names = ["text.png", "a.png", "missing.png", "cut.png", "empty.png", "b.webp"]
    code, lines, err = predict(bundle, *(f"{folder}/{name}" for name in names), folder)
    assert code == 3 and err == ""
    heads = [line for line in lines if not line.startswith("  ")]
    reasons = [line.removeprefix(f"{folder}/{name}: ") for name, line in zip(names, heads, strict=False)]
    assert [reason.split(":")[1].strip() if "not judged" in reason else "verdict" for reason in reasons] == [
        "ImageUnidentifiedError", "verdict", "FetchError", "ImageCorruptError", "ImageEmptyError", "verdict",
    ]  # fmt: skip
    assert reasons[2] == f"not judged: FetchError: there is no file {folder}/missing.png"
    assert heads[-1].startswith(f"{folder}: not judged: FetchError: ")


def test_json_has_one_object_per_image(bundle: str, folder: str, expected: dict[str, Verdict]) -> None:
    names = ["a.png", "missing.png", "ü 图.jpg", "cut.png"]
    code, lines, _ = predict(bundle, "--json", *(f"{folder}/{name}" for name in names))
    values = [json.loads(line) for line in lines]
    assert code == 3
    assert [value["image"] for value in values] == [f"{folder}/{name}" for name in names]
    assert [value["status"] for value in values] == ["scored", "failed", "scored", "failed"]
    assert {value["detector_id"] for value in values} == {Detector.load(bundle).detector_id}
    for value, name in ((values[0], "a.png"), (values[2], "ü 图.jpg")):
        assert value["prob_fake"] == pytest.approx(expected[name].prob_fake, abs=1e-5)
        assert (value["verdict"], value["caption"]) == (expected[name].verdict, expected[name].caption)
        assert value["error_class"] is None
    failed = [(value["error_stage"], value["error_class"], value["verdict"]) for value in values[1::2]]
    assert failed == [("fetch", "FetchError", None), ("decode", "ImageCorruptError", None)]


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_escape_codes_and_bytes_in_names_do_not_reach_the_terminal(
    form: list[str], bundle: str, tmp_path: Path
) -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp"
    names = [hostile + ".png", hostile + ".absent", os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"caf\xe9.absent")]
    try:
        for name in names[::2]:
            (tmp_path / name).write_bytes(FILES["a.png"])
    except OSError:
        pytest.skip("this filesystem takes UTF-8 names only")
    code, lines, _ = predict(bundle, *form, *(str(tmp_path / name) for name in names))
    assert code == 3
    assert all(line.isprintable() for line in lines)
    if form:
        assert [json.loads(line)["image"] for line in lines] == [str(tmp_path / name) for name in names]
        assert [json.loads(line)["status"] for line in lines] == ["scored", "failed"] * 2
    else:
        assert [("not judged" in line) for line in lines if not line.startswith("  ")] == [False, True] * 2


def test_limits_are_kept(bundle: str, folder: str) -> None:
    image = f"{folder}/a.png"
    size = len(FILES["a.png"])
    assert predict(bundle, image, "--max-bytes", str(size))[0] == 0
    code, lines, _ = predict(bundle, image, "--max-bytes", str(size - 1))
    assert code == 3 and lines[0].endswith(f"{size:,} bytes, the limit is {size - 1:,} (--max-bytes)")
    code, lines, _ = predict(bundle, image, "--max-pixels", "2000")
    assert code == 3 and "ImageTooLargeError: 56 × 40 px, the limit is 2,000 pixels" in lines[0]


def test_decoder_ends_with_the_command(bundle: str, folder: str) -> None:
    before = {child.pid for child in psutil.Process().children()}
    predict(bundle, f"{folder}/a.png")
    assert {child.pid for child in psutil.Process().children()} <= before


def test_other_scheme_and_missing_gpu_are_refused(bundle: str, folder: str) -> None:
    code, _, err = predict(bundle, "https://example.org/x.jpg")
    assert code == 2 and err.startswith("error: https://example.org/x.jpg: only local paths and s3://")
    if not torch.cuda.is_available():
        code, _, err = predict(bundle, f"{folder}/a.png", "--device", "cuda")
        assert code == 2 and err.startswith("error: --device cuda: this machine has no usable GPU")


@pytest.mark.s3
def test_detector_and_images_may_lie_in_a_bucket(
    bundle: str,
    expected: dict[str, Verdict],
    s3_environment: SwiftServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NSNET_CACHE", str(tmp_path / "cache"))
    bucket = put(new_bucket(), FILES)
    put(
        f"{bucket}/detector",
        {path.relative_to(bundle).as_posix(): path.read_bytes() for path in Path(bundle).rglob("*.*")},
    )
    names = ["a.png", "missing.png", "empty.png", "ü 图.jpg"]
    code, lines, _ = predict(f"{bucket}/detector", "--json", *(f"{bucket}/{name}" for name in names))
    values = [json.loads(line) for line in lines]
    assert code == 3
    assert [value["error_class"] for value in values] == [None, "FetchError", "ImageEmptyError", None]
    assert values[0]["prob_fake"] == pytest.approx(expected["a.png"].prob_fake, abs=1e-5)
    assert values[3]["prob_fake"] == pytest.approx(expected["ü 图.jpg"].prob_fake, abs=1e-5)


@pytest.mark.long  # a process that imports torch and transformers; tests/test_imports.py has the imports alone
def test_program_judges_without_ray(bundle: str, folder: str, expected: dict[str, Verdict]) -> None:
    code = (
        "import sys, jobs.predict\nfrom jobs.console import main\ntry:\n"
        "    main.run(jobs.predict.command, 'nsnet predict')\nexcept SystemExit as end:\n"
        "    print(end.code, 'ray' in sys.modules, 'torch' in sys.modules)"
    )
    arguments = [f"{folder}/a.png", f"{folder}/text.png", "--json", "--device", "cpu", "--detector", bundle]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=120, check=True)
    first, second, last = done.stdout.splitlines()
    assert last == "3 False True" and done.stderr == ""
    assert json.loads(first)["prob_fake"] == pytest.approx(expected["a.png"].prob_fake, abs=1e-5)
    assert json.loads(second)["error_class"] == "ImageUnidentifiedError"


def test_what_a_file_states_stands_apart_from_the_verdict(bundle: str, tmp_path: Path) -> None:
    (tmp_path / "list.pem").write_text(signer().anchors)
    mine = signed(picture())
    put(str(tmp_path), {"plain.jpg": picture(), "signed.jpg": mine, "other.jpg": mine[:-40] + bytes(38) + mine[-2:]})
    names = [f"{tmp_path}/{name}.jpg" for name in ("plain", "signed", "other")]
    code, lines, _ = predict(bundle, *names, "--trust-list", f"{tmp_path}/list.pem")
    stated = [line.strip() for line in lines if line.startswith("  ") and "px" not in line]
    assert code == 0 and stated == [
        "content credentials: valid (signed by a trusted signer, and the content is unaltered), made by Painter 3",
        "stated source: trainedAlgorithmicMedia",
        "content credentials: invalid (altered after it was signed, expired, or wrongly signed)",
    ]
    _, lines, _ = predict(bundle, "--json", *names)
    values = [json.loads(line) for line in lines]
    assert [row["c2pa_state"] for row in values] == ["none", "untrusted", "invalid"]
    assert values[0]["prob_fake"] == values[1]["prob_fake"]  # the same pixels


def test_views_say_whether_the_verdict_is_stable(bundle: str, folder: str, expected: dict[str, Verdict]) -> None:
    code, lines, _ = predict(bundle, "--views", "3", "--json", f"{folder}/a.png")
    row = json.loads(lines[0])
    assert code == 0 and row["prob_fake"] == pytest.approx(expected["a.png"].prob_fake, abs=1e-6)
    assert 0 < row["prob_spread"] < 1 and row["views_agree"] in (True, False)
    _, lines, _ = predict(bundle, "--views", "3", f"{folder}/a.png")
    words = "agree" if row["views_agree"] else "disagree: the verdict flips under mild changes of the file"
    assert lines[-1] == f"  views {words}; P(fake) differs by {row['prob_spread']:.3f} between them"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--views", "1", "1 is not in the range 2<=x<=9"), ("--views", "two", "'two' is not a valid integer"),
        ("--trust-list", "missing.pem", "there is no trust list"),
        ("--trust-list", "empty.pem", "holds no certificate"), ("--trust-list", "image.png", "is not text"),
    ],
)  # fmt: skip
def test_senseless_options_are_one_line(
    option: str, value: str, message: str, bundle: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(str(tmp_path), {"empty.pem": b"", "image.png": FILES["a.png"]})
    monkeypatch.chdir(tmp_path)
    code, lines, err = predict(bundle, option, value, f"{folder}/a.png")
    assert (code, lines) == (2, []) and message in err and "Traceback" not in err
