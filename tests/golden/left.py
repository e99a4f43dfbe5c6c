"""Make `left/`: what a release leaves on storage, for later releases to read and to continue.

`python -m tests.golden.left` was run once, at the commit in `left/COMMIT`. Run it again only to keep what a newer
release leaves, in another folder.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.golden.compute import FOLDER, LEFT, REPO_ROOT, write_exact_clip
from tests.support.swift import SwiftServer

BUCKET: Final = "golden"
COPIES: Final = 25
"""Of each image in the source of the unfinished run: enough rows for several commits."""
SCENES: Final = range(6)
COMMITTED: Final = re.compile(r"/checkpoint/[^.]*\.parquet$")
"""A file of Ray Data's checkpoint under its final name."""


def make_images_and_bundle() -> None:
    from jobs.dataset import synthetic
    from tests.support.models import FROZEN, as_if_trained

    synthetic.write_bucket(LEFT / "images", SCENES, seed=0, size_px=64, processes=1)
    with tempfile.TemporaryDirectory() as scratch:
        write_exact_clip(Path(scratch) / "clip")
        as_if_trained(FROZEN, seed=2, clip_weights=Path(scratch) / "clip").save(Path(scratch) / "bundle")
        shutil.rmtree(Path(scratch) / "bundle" / "clip")
        shutil.copytree(Path(scratch) / "bundle", LEFT / "bundle")


def put_images() -> None:
    """The twelve images, and the many of the unfinished run, on the S3 server of the environment."""
    from jobs.storage import writing

    for path in sorted((LEFT / "images").rglob("*.jpg")):
        name, content = path.relative_to(LEFT / "images").as_posix(), path.read_bytes()
        writing.write_bytes(f"s3://{BUCKET}/images/{name}", content)
        for copy in range(COPIES):
            writing.write_bytes(f"s3://{BUCKET}/many/{copy:02d}/{name}", content)


def download(place: str) -> None:
    from jobs.storage import listing, reading

    for entry in listing.list_files(f"s3://{BUCKET}/{place}"):
        path = LEFT / place / entry.uri.removeprefix(f"s3://{BUCKET}/{place}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(reading.read_bytes(entry.uri))


def run(*arguments: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "jobs.cli", *arguments], cwd=REPO_ROOT, env=environment)


def main() -> None:
    if LEFT.exists():
        raise SystemExit(f"{LEFT} exists: name another folder")
    make_images_and_bundle()
    from jobs.storage import filesystems, listing
    from tests.golden.compute import fixed_bundle

    with tempfile.TemporaryDirectory() as scratch, SwiftServer(Path(scratch) / "swift") as server:
        environment = os.environ | server.environment()
        os.environ.update(server.environment())
        system, _ = filesystems.filesystem(f"s3://{BUCKET}")
        system.mkdir(BUCKET)
        put_images()
        bundle = str(fixed_bundle(Path(scratch) / "bundle"))
        for command in (
            ("score", f"s3://{BUCKET}/images", "--detector", bundle, "--out", f"s3://{BUCKET}/scored"),
            ("caption", f"s3://{BUCKET}/images", "--out", f"s3://{BUCKET}/captioned"),
        ):
            assert run(*command, environment=environment).wait() == 0
        many = f"s3://{BUCKET}/unfinished"
        stopped = run("score", f"s3://{BUCKET}/many", "--detector", bundle, "--out", many, environment=environment)
        while not any(COMMITTED.search(entry.uri) for entry in listing.list_files(f"{many}/staging")):
            assert stopped.poll() is None, "it ended before a file of rows was committed"
            time.sleep(0.1)
        stopped.send_signal(signal.SIGTERM)
        assert stopped.wait() == 143
        for place in ("scored", "captioned", "unfinished"):
            download(place)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    (LEFT / "COMMIT").write_text(commit.stdout)


if __name__ == "__main__":
    assert FOLDER.is_dir()
    main()
