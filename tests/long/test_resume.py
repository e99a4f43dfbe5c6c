"""A training that is killed goes on in the middle of an epoch, and any number of workers takes the same steps."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.dataset import synthetic
from jobs.experiments.job import train
from jobs.experiments.request import TrainRequest
from jobs.experiments.trainer import TrainingFailedError
from jobs.storage import filesystems, listing
from nsnet import bundle
from nsnet.errors import UsageError
from tests.support.events import events
from tests.support.multinode import title
from tests.support.preloaded import COMMAND, processes_below
from tests.support.tables import new_bucket

BATCH, SCENES, EPOCHS = 8, 28, 3
STEPS = 2 * SCENES // BATCH
"""Of an epoch: a scene is two images."""
COMPARED = 20
SETTINGS = ("checkpoint_steps=2", "detector.lora.rank=0", "augmentation.jpeg_share=0.5", "augmentation.crop_share=0.5")
WEIGHTS = (bundle.NETWORK, f"{bundle.CLIP}/open_clip_model.safetensors")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "pictures"
    synthetic.write_bucket(folder / "train", range(SCENES), seed=0, size_px=224, processes=1)
    synthetic.write_bucket(folder / "val", range(SCENES, SCENES + 4), seed=0, size_px=224, processes=1)
    return folder


@pytest.fixture(scope="module")
def captions(source: Path, cluster: None) -> Path:
    """Captions, once for all trainings."""
    from jobs.workflows.caption import caption

    caption(str(source), out=str(source.parent / "captions"))
    return source.parent / "captions"


@pytest.fixture(scope="module")
def request_for(source: Path, captions: Path) -> Callable[..., TrainRequest]:
    """The same training, by other workers and elsewhere."""

    def ask(name: str, workers: int) -> TrainRequest:
        return TrainRequest(
            source=str(source), out=str(source.parent / name), captions=str(captions), workers=(workers, workers),
            epochs=EPOCHS, batch_size=BATCH, settings=SETTINGS,
        )  # fmt: skip

    return ask


class Stopped(Exception):
    """Stands for a driver that is stopped after the last epoch, before the bundle is written."""


def stop(*_: object, **__: object) -> None:
    raise Stopped


@pytest.fixture(scope="module")
def stopped(request_for: Callable[..., TrainRequest]) -> TrainRequest:
    """A training by two workers into a bucket, stopped before its bundle; it refuses to go on with other settings."""
    request = replace(request_for("undisturbed", 2), out=f"{new_bucket()}/detector")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.experiments.job.write_bundle", stop)
        with pytest.raises(Stopped):
            train(request)
    assert not listing.exists(request.out)
    with pytest.raises(UsageError, match="training with other settings .seed."):
        train(replace(request, seed=1))
    return request


@pytest.fixture(scope="module")
def undisturbed(stopped: TrainRequest, request_for: Callable[..., TrainRequest]) -> TrainRequest:
    """That training, finished by a second start: nothing happened to its steps. On disk, copied from the bucket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.experiments.inputs.write_manifest", stop)  # the images are not listed again
        train(stopped)
    request = request_for("undisturbed", 2)
    for remote, local in ((stopped.out, request.out), (stopped.work, request.work)):
        system, path = filesystems.filesystem(remote)
        system.get(path, local, recursive=True)
    return request


def last_good_step(request: TrainRequest) -> int:
    """Step of the checkpoint that a restart would begin with: Ray Train registers one seconds after its upload."""
    folder = Path(request.work, "checkpoints")
    try:
        snapshot = json.loads((folder / "checkpoint_manager_snapshot.json").read_text())
        name = snapshot["latest_checkpoint_result"]["checkpoint_dir_name"]
        return int(json.loads((folder / name / "state.json").read_text())["step"])
    except (OSError, ValueError, TypeError):  # none yet, or just being written
        return 0


def wait_for_the_middle_of_an_epoch(request: TrainRequest, after: int = STEPS, seconds: float = 400.0) -> int:
    """Until the last good checkpoint is a later one, inside an epoch; its step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        step = last_good_step(request)
        if step > after and step % STEPS:
            return step
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint in {seconds:g} s")


def kill_a_training_worker(driver: subprocess.Popen[str]) -> None:
    """One of the processes that train, below the Ray cluster that a driver has begun."""
    next(process for process in processes_below(driver.pid) if "RayTrainWorker" in title(process)).kill()


def assert_same_outcome(found: TrainRequest, expected: TrainRequest) -> None:
    """Equal weights, and a history with equal losses in every epoch."""
    for name in WEIGHTS:
        theirs, ours = load_file(Path(expected.out, name)), load_file(Path(found.out, name))
        assert theirs.keys() == ours.keys()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    theirs_result, ours_result = (
        json.loads(Path(request.work, "result.json").read_text()) for request in (expected, found)
    )
    assert len(ours_result["history"]) == EPOCHS
    assert [pytest.approx(record, abs=1e-6) for record in theirs_result["history"]] == ours_result["history"]
    assert ours_result["calibration"]["temperature"] == pytest.approx(
        theirs_result["calibration"]["temperature"], abs=1e-6
    )


def losses(request: TrainRequest) -> list[float]:
    """The loss of each step, as TensorBoard's files have it; after a restart the newer file counts."""
    found: dict[int, float] = {}
    for path in sorted(Path(request.work, "tensorboard").iterdir()):
        for event in events(path.read_bytes()):
            for value in event.summary.value:
                if value.tag == "loss":
                    found[event.step] = value.simple_value
    return [found[step] for step in sorted(found)]


def test_training_whose_worker_and_then_driver_are_killed_ends_as_if_nothing_had_happened(
    request_for: Callable[..., TrainRequest], undisturbed: TrainRequest
) -> None:
    request = request_for("killed", 2)
    command = [*COMMAND, "jobs.train", request.source, "--out", request.out, "--workers", "2"]
    command += ["--epochs", str(EPOCHS), "--batch-size", str(BATCH), "--captions", str(request.captions)]
    command += [part for setting in SETTINGS for part in ("--set", setting)]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    process = start()
    try:
        began_again_at = wait_for_the_middle_of_an_epoch(request)
        kill_a_training_worker(process)
        # the driver goes on with new workers, until it is killed as well
        stopped_at = wait_for_the_middle_of_an_epoch(request, after=began_again_at)
        assert began_again_at < stopped_at < EPOCHS * STEPS
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
    assert not Path(request.out, bundle.DESCRIPTION).exists()

    process = start()
    timer = threading.Timer(480, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    try:
        _, log = process.communicate()
    finally:
        timer.cancel()
    assert process.returncode == 0, log[-3000:]
    assert "continuing an unfinished training" in log
    assert f"train: epoch {EPOCHS}/{EPOCHS}" in log and "train: epoch 1/" not in log
    assert len(list(Path(request.work, "tensorboard").iterdir())) == 3  # of each beginning
    assert_same_outcome(request, undisturbed)


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_takes_the_same_steps(
    workers: int, request_for: Callable[..., TrainRequest], undisturbed: TrainRequest
) -> None:
    request = request_for(f"{workers}-workers", workers)
    train(request)
    expected, found = losses(undisturbed), losses(request)
    assert len(expected) == len(found) == EPOCHS * STEPS >= COMPARED
    assert found[:COMPARED] == pytest.approx(expected[:COMPARED], abs=1e-4)
    assert max(expected) - min(expected) > 0.1  # it learned: equal constants would prove nothing


def test_training_that_was_stopped_before_its_bundle_goes_on_and_finds_nothing_out_again(
    stopped: TrainRequest, undisturbed: TrainRequest
) -> None:
    """All but this is checked while the training is stopped and continued, by the two fixtures."""
    assert listing.exists(f"{stopped.out}/{bundle.DESCRIPTION}")
    assert Path(undisturbed.out, bundle.DESCRIPTION).is_file() and len(losses(undisturbed)) == EPOCHS * STEPS


def test_loss_that_is_not_finite_ends_the_training_with_the_images_of_its_step(
    source: Path, captions: Path, request_for: Callable[..., TrainRequest]
) -> None:
    settings = ("head_lr=1e30", "warmup=0", "checkpoint_steps=1", "detector.lora.rank=0")
    request = replace(request_for("diverged", 1), settings=settings)
    with pytest.raises(TrainingFailedError, match=r"the loss is not finite in step 2 \(epoch 1\)"):
        train(request)
    assert not Path(request.out).exists() and not Path(request.work, "result.json").exists()
    diverged = json.loads(Path(request.work, "diverged.json").read_text())
    assert diverged["step"] == 2 and len({image["image_id"] for image in diverged["pictures"]}) == BATCH
    assert all(Path(image["uri"]).is_relative_to(source / "train") for image in diverged["pictures"])
    assert last_good_step(request) == 1
