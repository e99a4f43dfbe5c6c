"""The command line: what is wrong with its arguments is one line and an exit code, before anything is started."""

import errno
import io
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from jobs import cli
from jobs.console import main, output, parameters
from jobs.storage import probes, writing
from jobs.storage.left_out import LeftOut, first_named
from jobs.storage.uris import Uri
from nsnet import bundle as bundles
from nsnet.errors import NsnetError, StorageError, UsageError
from tests.support.tables import image_file, put, run_command, save_bundle, unmarked

pytestmark = pytest.mark.usefixtures("no_cluster")

REPO_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_bundle(tmp_path_factory.mktemp("detector")))


@pytest.fixture
def images(tmp_path: Path) -> str:
    files = {f"{label}/{i}.png": image_file(i) for i, label in enumerate(["0_real", "1_fake"] * 2)}
    return put(str(tmp_path / "pictures"), files)


def complaint(*arguments: str, code: int = 2) -> str:
    """The one line that a command ends with, without its `error: `."""
    ended, out, err = run_command(*arguments)
    lines = err.splitlines()
    assert ended == code, err
    assert [line for line in lines if line.startswith("error:")] == lines[-1:], err
    assert out == "" and "Traceback" not in err
    return lines[-1].removeprefix("error: ")


def usage_error(*arguments: str) -> str:
    """What click says of wrong usage."""
    ended, out, err = run_command(*arguments)
    assert ended == 2 and out == "" and "Traceback" not in err
    assert err.startswith("Usage: nsnet")
    return err.splitlines()[-1]


# What every command refuses.


def test_missing_arguments_are_named() -> None:
    assert "Missing argument 'SOURCE'" in usage_error("score", "--detector", "d", "--out", "o")
    assert "Missing option '--detector'" in usage_error("score", "s", "--out", "o")
    assert "Missing option '--out'" in usage_error("train", "s")
    assert "Missing argument 'IMAGE...'" in usage_error("predict", "--detector", "d")
    assert "No such command 'scoer'" in usage_error("scoer")
    assert "No such option" in usage_error("score", "--speed", "fast")


def test_program_without_arguments_shows_its_help() -> None:
    code, out, err = run_command()
    assert code == 2 and out == "" and err.startswith("Usage: nsnet") and "predict" in err


@pytest.mark.parametrize("value", ["lots", "1%%", "", "%", "101%", "-1%", "1.01", "nan", "inf%"])
def test_share_that_is_none_is_refused(value: str) -> None:
    message = usage_error("score", "s", "--detector", "d", "--out", "o", "--max-failed", value)
    assert "Invalid value for '--max-failed'" in message and repr(value) in message


@pytest.mark.parametrize(
    ("value", "share"), [("1%", 0.01), ("0.01", 0.01), (" 0% ", 0.0), ("100%", 1.0), ("2.5%", 0.025)]
)
def test_share_is_read_as_percent_or_fraction(value: str, share: float) -> None:
    assert parameters.ShareType().convert(value, None, None) == pytest.approx(share)


LIMITS = [("--max-bytes", "0"), ("--max-pixels", "-1"), ("--max-seconds", "0"), ("--max-seconds", "nan")]


@pytest.mark.parametrize(("option", "value"), LIMITS)
@pytest.mark.parametrize("command", ["score", "caption", "train", "predict"])
def test_limit_below_the_least_is_refused(
    command: str, option: str, value: str, bundle: str, images: str, tmp_path: Path
) -> None:
    given = ["--detector", bundle] if command in ("score", "predict") else []
    given += ["--out", str(tmp_path / "out")] if command != "predict" else []
    message = complaint(command, images, *given, option, value)
    assert message.startswith(f"{option[2:].replace('-', '_')} must be positive, got {value}")
    assert not (tmp_path / "out").exists()


SOURCE_COMMANDS = {"score": ["--detector", "BUNDLE"], "caption": [], "train": []}


@pytest.mark.parametrize("command", SOURCE_COMMANDS)
def test_source_that_is_none_is_refused(command: str, bundle: str, images: str, tmp_path: Path) -> None:
    given = [bundle if word == "BUNDLE" else word for word in SOURCE_COMMANDS[command]]
    (tmp_path / "empty").mkdir()
    put(str(tmp_path / "texts"), {"a.txt": b"text"})
    (tmp_path / "text.parquet").write_text("text")
    pq.write_table(pa.table({"url": ["a"]}), tmp_path / "urls.parquet")
    expected = {
        "absent": "there is no folder or prefix",
        "empty": "holds no images",
        "texts": r"holds no images \(1: \.txt is no picture\)",
        "text.parquet": "is not a complete Parquet file",
        "urls.parquet": "neither a `uri` column nor an image column",
        "pictures/0_real/0.png": "use nsnet predict",
    }
    for name, reason in expected.items():
        out = str(tmp_path / "out" / name.partition("/")[0])
        assert re.search(reason, complaint(command, str(tmp_path / name), *given, "--out", out)), name
    nowhere = "names no file or bucket"
    for source, reason in (("gs://bucket/x", "not gs://"), ("", nowhere), ("s3://", nowhere)):
        assert reason in complaint(command, source, *given, "--out", str(tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("manifest.parquet"))


@pytest.mark.parametrize("command", SOURCE_COMMANDS)
def test_output_that_cannot_be_is_refused(command: str, bundle: str, images: str, tmp_path: Path) -> None:
    given = [bundle if word == "BUNDLE" else word for word in SOURCE_COMMANDS[command]]
    (tmp_path / "file").write_text("")
    for out, reason in {
        "gs://bucket/x": "not gs://",
        "": "names no file or bucket",
        str(tmp_path / "file"): "is a file",
        str(tmp_path / "file" / "deeper" / "out"): "is a file",
        f"{images}/out": "is inside the source",
    }.items():
        assert reason in complaint(command, images, *given, "--out", out)


@pytest.mark.parametrize("command", ["score", "caption", "train", "evaluate", "predict"])
def test_store_that_cannot_be_reached_is_one_line_and_an_exit_code_of_its_own(
    command: str, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-s3cret")
    monkeypatch.setattr(probes, "PROBE_TIMEOUT_SECONDS", 0.5)
    given = {"score": ["--detector", bundle], "predict": ["--detector", "s3://bucket/detector"]}.get(command, [])
    given += ["--out", str(tmp_path / "out")] if command != "predict" else []
    message = complaint(command, "s3://bucket/x", *given, code=1)
    assert message.startswith("the bucket s3://bucket at http://127.0.0.1:9 cannot be reached")
    assert "a-s3cret" not in message
    s3fs.S3FileSystem.clear_instance_cache()


# What single commands refuse.


@pytest.mark.parametrize("command", ["score", "predict"])
def test_detector_that_is_none_or_damaged_is_refused(command: str, bundle: str, images: str, tmp_path: Path) -> None:
    def complaint_about(detector: str) -> str:
        given = ["--out", str(tmp_path / "out")] if command == "score" else []
        source = images if command == "score" else f"{images}/0_real/0.png"
        return complaint(command, source, "--detector", detector, *given)

    assert "is no detector bundle: detector.json is missing" in complaint_about(str(tmp_path / "absent"))
    assert "is no detector bundle: detector.json is missing" in complaint_about(images)
    assert "not gs://" in complaint_about("gs://bucket/detector")
    original = Path(bundle, bundles.DESCRIPTION).read_bytes()
    weights = Path(bundle, bundles.NETWORK).read_bytes()
    for name, content, reason in (
        (bundles.DESCRIPTION, b"{", "is damaged"),
        (bundles.DESCRIPTION, original.replace(b'"format_version": 2', b'"format_version": 99'), "format version 99"),
        (bundles.NETWORK, weights[:-1], "the SHA-256 of network.safetensors"),
        (bundles.NETWORK, None, "network.safetensors is missing"),
    ):
        copy = tmp_path / f"{reason} {len(content or b'')}"
        put(str(copy), {path.relative_to(bundle).as_posix(): path.read_bytes() for path in Path(bundle).rglob("*.*")})
        (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
        assert reason in complaint_about(str(copy))
    assert not (tmp_path / "out").exists()


def test_counts_below_the_least_are_refused(bundle: str, images: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert "--batch-size" in complaint("score", images, "--detector", bundle, *out, "--batch-size", "0")
    assert "--limit" in complaint("score", images, "--detector", bundle, *out, "--limit", "0")
    assert "--batch-size" in complaint("caption", images, *out, "--batch-size", "-3")
    assert "--workers" in complaint("train", images, *out, "--workers", "0")
    assert "--seed" in complaint("train", images, *out, "--seed", "-1")
    assert "epochs" in complaint("train", images, *out, "--epochs", "0")
    assert "batch_size" in complaint("train", images, *out, "--batch-size", "1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["caption", "train"])
def test_unknown_recipe_is_refused_with_what_is_close(command: str, images: str, tmp_path: Path) -> None:
    message = complaint(command, images, "--out", str(tmp_path / "out"), "--recipe", "ViT-L-41")
    assert "unknown recipe 'ViT-L-41'" in message and "did you mean" in message and "ViT-L-14" in message


def test_weights_that_are_not_there_are_refused(bundle: str, images: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert "is not a transformers BLIP folder" in complaint("caption", images, *out, "--captioner", images)
    message = complaint("score", images, "--detector", bundle, *out, "--clip-weights", "s3://bucket/clip.pt")
    assert "must be a local path" in message


@pytest.mark.parametrize("folders", [("a", "b"), ("0_real", "b"), ("0_real", "nature"), ("1_fake", "ai")])
def test_training_without_both_labels_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    files = {f"{folder}/{i}.png": image_file(i) for folder in folders for i in range(3)}
    source = put(str(tmp_path / "pictures"), files)
    message = complaint("train", source, "--out", str(tmp_path / "out"))
    if folders[1] == "b":
        count = 6 if folders[0] == "a" else 3
        assert message.startswith(f"{count} of 6 images have no label: put them into 0_real and 1_fake")
    else:
        counts = (6, 0) if folders[0] == "0_real" else (0, 6)
        assert message == "the source has {} real and {} fake images; both are needed".format(*counts)


def test_work_that_is_done_is_not_done_again(images: str, tmp_path: Path) -> None:
    put(str(tmp_path / "trained"), {"detector.json": b"{}"})
    message = complaint("train", images, "--out", str(tmp_path / "trained"))
    assert "already holds a trained detector; choose another --out" in message


@pytest.mark.parametrize(("failed", "code"), [(0, 0), (1, 0), (2, 3)])
def test_more_failures_than_allowed_are_exit_code_3(failed: int, code: int) -> None:
    assert main.exit_code({"status": {"failed": failed, "scored": 100 - failed}}, 100, 0.01) == code


@pytest.mark.parametrize(("allowed", "code"), [("0", 3), ("1", 3), ("2", 0)])
@pytest.mark.parametrize("command", ["score", "caption"])
def test_more_of_the_source_unread_than_allowed_is_exit_code_3(
    command: str, allowed: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"counts": {"status": {}}, "rows": 0, "unread": ["/a: Permission denied", "/b.tar"], "unread_count": 2}
    if command == "score":
        monkeypatch.setattr("jobs.score.score_together", lambda *_, **__: [record])
    else:
        monkeypatch.setattr("jobs.caption.caption", lambda *_, **__: record)
    options = ("--detector", "d") if command == "score" else ()
    ended, out, err = run_command(command, "pictures", "--out", "out", *options, "--max-left-out", allowed)
    assert (ended, out) == (code, "")
    assert ("2 folders or containers" in err and "/a: Permission denied; /b.tar" in err) is (code == 3)


def test_what_could_not_be_read_is_named_in_one_line_that_stays_short() -> None:
    named = [f"/{i}: Permission denied" for i in range(100)]
    assert first_named(5000, named) == "; ".join(named[:3]) + "; and 4,997 more"
    assert first_named(2, named[:2]) == "; ".join(named[:2])


def test_names_that_are_no_utf8_can_be_recorded() -> None:
    left_out = LeftOut()
    left_out.add_unread("folder that cannot be read", "/\udcff: Permission denied")
    assert left_out.named == ["/\\xff: Permission denied"]
    writing.encode_json(left_out.named)


def test_training_with_other_settings_does_not_continue(images: str, tmp_path: Path) -> None:
    put(str(tmp_path / "out.training"), {"settings.json": b'{"seed": 7}'})
    message = complaint("train", images, "--out", str(tmp_path / "out"))
    assert "training with other settings (" in message and "seed" in message


def test_evaluation_without_verdicts_is_refused(images: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert "does not exist" in complaint("evaluate", str(tmp_path / "absent"), *out)
    assert "give --detector" in complaint("evaluate", images, *out)


# The program itself.


def test_escape_codes_in_messages_do_not_reach_the_terminal(tmp_path: Path) -> None:
    message = complaint("score", str(tmp_path / "\x1b[2J\x9b31m\nx"), "--detector", "d", "--out", str(tmp_path / "out"))
    assert message.isprintable()


def test_exit_codes_of_errors_are_those_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    def command_raising(error: BaseException) -> tuple[int, str]:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(cli.group, "invoke", fail)
        ended, out, err = run_command("score")
        assert out == "" and "Traceback" not in err and len(err.strip().splitlines()) == 1
        return ended, err.strip()

    for error, code in ((NsnetError("a\n b"), 1), (StorageError("x"), 1), (UsageError("x"), 2)):
        assert command_raising(error)[0] == code
    assert command_raising(KeyboardInterrupt()) == (130, "error: stopped")
    for failure in (OSError(errno.ESTALE, "x"), ConnectionError("http://me:s3cret@store x"), PermissionError("x")):
        code, message = command_raising(failure)
        assert code == 1 and message.startswith("error: the store failed: ") and "s3cret" not in message


WAITS = """
import sys, time
from jobs import cli
from jobs.console import main
from jobs.runs import lock

def wait(*_, **__):
    with lock.hold(sys.argv[1]):
        print("working", flush=True)
        time.sleep(60)

cli.group.invoke = wait
main.run(cli.group, "nsnet")
"""


def test_sigterm_ends_a_command_in_one_line_and_releases_its_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WAITS, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPO_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "working\n"
            process.terminate()
            _, log = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, unmarked(log)) == (143, "error: stopped\n")
    (held,) = (tmp_path / "locks").iterdir()
    assert json.loads(held.read_text()) == {"released": True}


def test_error_of_the_program_itself_keeps_its_traceback_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("https://me:s3cret@store/x?sig=s1gned")

    monkeypatch.setattr(cli.group, "invoke", fail)
    code, out, err = run_command("score")
    assert code == 1 and out == "" and err.startswith("Traceback (most recent call last):")
    assert err.splitlines()[-1] == "KeyError: 'https://***@store/x?***'" and "in fail" in err


def run_program(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[bytes]:
    """`nsnet` as a process of its own."""
    environment = {**os.environ, **settings.pop("env", {})}
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    return subprocess.run(command, cwd=REPO_ROOT, capture_output=True, timeout=120, env=environment, **settings)


def test_file_that_may_not_grow_is_named(images: str, tmp_path: Path) -> None:
    """The kernel's own refusal, as on a full disk, which needs no rights here."""
    out = tmp_path / "out"
    done = run_program(
        "audit", images, "--out", str(out),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY)),
    )  # fmt: skip
    last = unmarked(done.stderr.decode()).splitlines()[-1]
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert re.fullmatch(rf"error: {re.escape(str(out))}/\S+: File too large; .*`ulimit -f`.*", last), last
    assert not list(out.rglob("*.partial-*"))


def test_output_on_a_disk_that_is_read_only_is_refused(images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = os.statvfs("/proc").f_flag | os.ST_RDONLY
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=flags))
    assert "is mounted read-only; choose another --out" in complaint("caption", images, "--out", "/tmp/x", code=1)


def test_output_with_a_name_that_is_too_long_is_refused(images: str, tmp_path: Path) -> None:
    message = complaint("caption", images, "--out", str(tmp_path / ("x" * 300)))
    assert "cannot be a folder: File name too long" in message


@pytest.mark.parametrize("place", ["source", "--out", "--captioner", "--clip-weights"])
def test_address_that_is_not_utf8_is_refused_in_a_printable_form(place: str, images: str, tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    given = {"source": images, "--out": str(tmp_path / "out"), place: name}
    source = given.pop("source")
    done = run_program(
        "caption", source, *(part for option in given.items() for part in option), env={"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: '\S+/caf\\udce9' is not UTF-8: rename it, .*\n", unmarked(done.stderr.decode("ascii")))


@pytest.mark.parametrize("option", ["--captions", "--split"])
def test_empty_address_of_an_optional_option_counts_as_not_given(option: str, images: str, tmp_path: Path) -> None:
    message = complaint("train", images, "--out", str(tmp_path / "out"), option, "", "--workers", "3-2")
    assert "--workers must be" in message


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_a_stream_lacks_end_nothing(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def shows(*_: Any, **__: Any) -> None:
        output.show("ü 图 \udcff")
        output.say("ü 图 \udcff")

    monkeypatch.setattr(cli.group, "invoke", shows)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "argv", ["nsnet", "score"])
    with pytest.raises(SystemExit) as ended:
        main.run(cli.group, "nsnet")
    assert ended.value.code == 0
    for stream in streams:
        stream.flush()
        assert re.sub(rb"summary .*\n", b"", stream.buffer.getvalue()).endswith(b"?\n")  # type: ignore[attr-defined]


def test_reader_of_results_that_has_gone_is_one_line(tmp_path: Path) -> None:
    code = (
        "import os, sys, jobs.cli as cli\nfrom jobs.console import main, output\n"
        "cli.group.invoke = lambda *_: [output.show('x' * 100_000) for _ in range(100)]\n"
        "sys.argv = ['nsnet', 'score']\n"
        "main.run(cli.group, 'nsnet')"
    )
    reader, pipe = os.pipe()
    os.close(reader)
    with os.fdopen(pipe, "wb") as gone:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=REPO_ROOT, stdout=gone, stderr=subprocess.PIPE, timeout=60
        )
    assert done.returncode == 1
    assert unmarked(done.stderr.decode()) == "error: standard output cannot be written: Broken pipe\n"


class FullDisk(io.StringIO):
    """A log on a disk that is full."""

    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_log_that_cannot_be_written_ends_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", FullDisk())
    output.say("a line")
    output.redraw("a line")
    monkeypatch.setattr(sys, "stdout", FullDisk())
    with pytest.raises(output.OutputError, match="standard output cannot be written: No space left on device"):
        output.show("a result")


def test_home_that_is_not_known_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cli.group, "invoke", fail)
    code, _, err = run_command("score")
    assert code == 1 and err.splitlines() == [
        "error: RuntimeError: Could not determine home directory. Set HOME to a writable folder"
    ]


def test_program_answers_quickly_and_starts_no_library_for_its_help() -> None:
    code = (
        "import sys, jobs.cli\ntry:\n    jobs.cli.main()\nexcept SystemExit as end:\n"
        "    print(end.code, sorted({'torch', 'ray', 'transformers'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], cwd=REPO_ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []" and done.stderr == ""
    for name in cli.COMMANDS:
        assert f"  {name} " in done.stdout


def test_program_ends_in_one_line_with_its_code(tmp_path: Path) -> None:
    arguments = ["jobs.score", "absent", "--detector", "absent", "--out", str(tmp_path / "out")]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=REPO_ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*absent is no detector bundle: detector\.json is missing\n", unmarked(done.stderr))
    assert time.monotonic() - started < 30


ADDRESSES = {
    "source", "out", "detector", "predictions", "captions", "verdicts_or_source", "rates", "weights", "to", "mirror"
}  # fmt: skip
WEIGHTS = {"clip_weights", "captioner", "head"}


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "submit"])  # its arguments are another's
def test_addresses_are_made_absolute_where_a_command_begins(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is behind the command resolves none again."""
    monkeypatch.chdir(tmp_path)
    command = cli.group.get_command(click.Context(cli.group), name)
    assert command is not None
    parts = command.commands.values() if isinstance(command, click.Group) else [command]
    options = {str(option.name): option.type for part in parts for option in part.params}
    wanted = ADDRESSES | ({"split"} if name == "train" else set())
    assert wanted & options.keys() or WEIGHTS & options.keys()
    for option in wanted & options.keys():
        found = options[option].convert("a/../b", None, None)
        assert type(found) is Uri and found == f"{tmp_path}/b", option
    for option in WEIGHTS & options.keys():
        assert options[option].convert("weights", None, None) == f"{tmp_path}/weights", option
        with pytest.raises(UsageError, match="must be a local path"):
            options[option].convert("s3://bucket/weights", None, None)


STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ "


def test_lines_of_a_log_carry_time_and_run(capsys: pytest.CaptureFixture[str]) -> None:
    output.begin_lines()
    output.say("one\ntwo")
    with output.lines_of_run("20260102T030405Z-abcdef"):
        output.say("of the run")
    output.say("after it")
    with pytest.raises(ValueError), output.lines_of_run("20260102T030405Z-abcdef"):
        raise ValueError
    output.say("error: why it ended")
    output.begin_lines()
    output.say("another command")
    expected = [
        "one", "two", "20260102T030405Z-abcdef of the run", "after it",
        "20260102T030405Z-abcdef error: why it ended", "another command",
    ]  # fmt: skip
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(expected)
    for line, text in zip(lines, expected, strict=True):
        assert re.fullmatch(STAMP + re.escape(text), line)


def test_lines_on_a_terminal_are_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    output.say("a line")
    assert terminal.getvalue() == "a line\n"


@pytest.mark.parametrize("asked", ["--debug", "NSNET_DEBUG", "nothing"])
def test_traceback_of_a_store_error_is_shown_on_request(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what an error was raised `from None` over."""
    monkeypatch.setenv("NSNET_DEBUG", "1" if asked == "NSNET_DEBUG" else "")

    def fail(*_: object, **__: object) -> None:
        try:
            raise PermissionError(errno.EACCES, "Access Denied by https://me:s3cret@store")
        except PermissionError:
            raise StorageError("the store refuses") from None

    monkeypatch.setattr(probes, "check_output", fail)
    bundle = save_bundle(tmp_path / "detector")
    options = ["--debug"] if asked == "--debug" else []
    code, _, log = run_command(
        "score", str(tmp_path), "--detector", str(bundle), "--out", str(tmp_path / "o"), *options
    )
    assert code == 1 and log.splitlines()[-1].endswith("error: the store refuses")
    shown = asked != "nothing"
    assert ("Traceback" in log) == ("PermissionError" in log) == shown
    assert "s3cret" not in log and len(log.splitlines()) == 1 or shown
