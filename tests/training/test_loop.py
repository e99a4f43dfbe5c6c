"""The loop of a training process, without Ray: what ends it, what it keeps, and how it continues. Costs 5 s."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs.dataset.schema import SPLIT
from jobs.storage.uris import Uri
from jobs.training import checkpoints, loop
from jobs.training.checkpoints import Progress
from jobs.training.config import WorkerConfig
from jobs.training.examples import Examples
from jobs.training.ingest import Arrival
from jobs.training.loop import Loop
from jobs.training.order import Order
from nsnet.configuration import TrainingConfig
from nsnet.detector import Detector
from nsnet.losses import SINGLE_PROCESS
from nsnet.training import build_optimizer
from tests.support.models import FROZEN, mosaics
from tests.support.tables import manifest_row

CPU = torch.device("cpu")
DIGEST = "of the settings"
COUNTS = {"train": 24, "val": 8, "test": 4}
STEPS = 3
"""Of an epoch."""
CONFIG = TrainingConfig(
    epochs=3, batch_size=8, head_lr=3e-3, backbone_lr=1e-3, precision="fp32", checkpoint_steps=2
)  # fmt: skip
VAL_ROWS = [row for row in range(sum(COUNTS.values())) if COUNTS["train"] <= row < COUNTS["train"] + COUNTS["val"]]


def examples() -> Examples:
    splits = [name for name, count in COUNTS.items() for _ in range(count)]
    rows = [
        dict.fromkeys(SPLIT.names)
        | manifest_row(f"/{i}.png", image_id=f"{i:032x}", label=i % 2, generator="g", split=split)
        for i, split in enumerate(splits)
    ]
    features = np.random.default_rng(0).standard_normal((len(rows), 32)).astype(np.float32)
    return Examples(table=pa.Table.from_pylist(rows, schema=SPLIT), text_features=features)


EXAMPLES = examples()
MOSAICS = mosaics(len(EXAMPLES.image_ids))


class Images:
    """Stands for `Ingest`: the mosaic of an image depends on its row alone, and some images fail."""

    def __init__(self, failing: Sequence[int] = ()) -> None:
        self._failing = failing
        self.first_steps: list[int] = []

    def stream(self, order: Order, first: int, last: int) -> Iterator[Arrival]:
        self.first_steps.append(first)
        for step in range(first, last):
            rows, valid = order.part(step)
            good = ~np.isin(rows, self._failing)
            failed = [{"image_id": EXAMPLES.image_ids[row]} for row in rows[valid & ~good]]
            yield Arrival(rows=rows, valid=valid & good, mosaics=MOSAICS[rows], failed=failed)


class Reports:
    """Stands for Ray Train: keeps what is reported, and copies of the checkpoints."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.metrics: list[dict[str, Any]] = []

    def report(self, metrics: dict[str, Any], *, checkpoint: Any, checkpoint_upload_mode: Any) -> None:
        shutil.copytree(checkpoint.path, self.checkpoint(len(self.metrics)))
        checkpoints.remove(Path(checkpoint.path))
        self.metrics.append(metrics)

    def checkpoint(self, number: int) -> Path:
        return self._folder / str(number)


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reports:
    found = Reports(tmp_path / "checkpoints")
    monkeypatch.setattr("ray.train.report", found.report)
    return found


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Loop]:
    """A loop, from a checkpoint if one is given; `changes`: of `TrainingConfig`."""

    def loop_of(
        images: Images | None = None, checkpoint: Path | None = None, failed_share: float = 0.05, **changes: Any
    ) -> Loop:
        training, network = replace(CONFIG, **changes), Detector.build(FROZEN, seed=1).network
        optimizer, progress = build_optimizer(network, training), Progress()
        if checkpoint is not None:
            progress = checkpoints.restore(checkpoint, network, optimizer, CPU, DIGEST)
        place = Uri(str(tmp_path / "work"))
        config = WorkerConfig(
            detector={}, training={}, preparation={}, seed=3, source=place, clip_weights=None, work=place, split=place,
            captions=None, features_id="", fitted=None, text_weights=None, digest=DIGEST, failed_share=failed_share,
            task_cpus=1.0, board=None,
        )  # fmt: skip
        return Loop(
            config=config, training=training, loss=FROZEN.loss, network=network, model=network, optimizer=optimizer,
            progress=progress, examples=EXAMPLES, ingest=images or Images(),  # type: ignore[arg-type]
            gather=SINGLE_PROCESS, device=CPU,
        )  # fmt: skip

    return loop_of


def test_training_that_stops_within_an_epoch_continues_as_if_it_had_not_stopped(
    make: Callable[..., Loop], reports: Reports
) -> None:
    whole = make()
    assert whole.run() is None
    steps = [metrics.get("step") for metrics in reports.metrics]
    assert steps == [2, None, 4, None, 8, None, None]  # None: an epoch, and the end
    images = Images()
    continued = make(images, reports.checkpoint(2))
    assert (continued.progress.step, continued.progress.step % STEPS) == (4, 1)
    assert continued.run() is None
    assert images.first_steps[0] == 4
    assert continued.progress.history == whole.progress.history and len(whole.progress.history) == 3
    assert len({record["loss"] for record in whole.progress.history}) == 3
    for name in ("best", "validation", "test"):
        theirs, ours = getattr(whole.progress, name), getattr(continued.progress, name)
        assert theirs.keys() == ours.keys() and theirs
        assert all(torch.equal(ours[key], value) for key, value in theirs.items()), name


def test_finished_training_takes_no_further_step(make: Callable[..., Loop], reports: Reports) -> None:
    whole = make(epochs=1)
    assert whole.run() is None and reports.metrics[-1] == {loop.FINISHED: True}
    images = Images()
    again = make(images, reports.checkpoint(len(reports.metrics) - 1), epochs=1)
    assert again.run() is None
    assert images.first_steps == [] and again.progress.history == whole.progress.history


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Seed and loss of each step that is taken."""
    taken: list[tuple[int, float]] = []
    step = loop.training_step

    def recorded(*arguments: Any, seed: int) -> Any:
        losses, energy = step(*arguments, seed=seed)
        taken.append((seed, float(losses[0])))
        return losses, energy

    monkeypatch.setattr(loop, "training_step", recorded)
    return taken


def test_each_step_has_a_seed_of_its_own(
    make: Callable[..., Loop], reports: Reports, steps: list[tuple[int, float]]
) -> None:
    """Dropout would otherwise drop the same in every step."""
    assert make(epochs=2).run() is None
    assert len({seed for seed, _ in steps}) == len(steps) == 2 * STEPS


def test_record_of_an_epoch_is_the_mean_of_its_steps(
    make: Callable[..., Loop], reports: Reports, steps: list[tuple[int, float]]
) -> None:
    trained = make(epochs=2)
    assert trained.run() is None
    epochs = [sum(loss for _, loss in steps[i : i + STEPS]) / STEPS for i in (0, STEPS)]
    assert [record["loss"] for record in trained.progress.history] == pytest.approx(epochs, abs=1e-6)


def test_too_many_failed_images_in_an_epoch_end_a_training_with_their_names(
    make: Callable[..., Loop], reports: Reports, tmp_path: Path
) -> None:
    reason = make(Images(failing=[1, 5])).run()
    assert reason is not None
    assert reason.startswith("2 of 24 training images could not be read, more than 5% (--max-failed)")
    files = (tmp_path / "work" / "failed").iterdir()
    named = [row["image_id"] for path in files for row in json.loads(path.read_text())]
    assert sorted(named) == [EXAMPLES.image_ids[1], EXAMPLES.image_ids[5]]


def test_failed_images_below_the_limit_are_counted_in_each_epoch(make: Callable[..., Loop], reports: Reports) -> None:
    images = make(Images(failing=[1, 5]), failed_share=0.1)
    assert images.run() is None
    assert [record["failed"] for record in images.progress.history] == [2, 2, 2]


def test_too_many_failed_images_of_the_validation_end_a_training(make: Callable[..., Loop], reports: Reports) -> None:
    reason = make(Images(failing=[VAL_ROWS[0]])).run()
    assert reason is not None and "1 of 8 images of the split val could not be read, more than 5%" in reason
    judged = make(Images(failing=[VAL_ROWS[0]]), failed_share=0.2)
    assert judged.run() is None
    assert judged.progress.validation[checkpoints.ROWS].tolist() == VAL_ROWS[1:]


@pytest.mark.parametrize("pending", [2, 20])
def test_history_does_not_depend_on_how_often_losses_are_read(
    pending: int, make: Callable[..., Loop], reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where each reading waits; `checkpoint_steps` and the ends of epochs lie between."""
    expected = make()
    assert expected.run() is None
    monkeypatch.setitem(loop.LOG_STEPS, "cpu", pending)
    seldom = make()
    assert seldom.run() is None
    assert seldom.progress.history == expected.progress.history
    assert all(record["failed"] == 0 for record in expected.progress.history)


def test_loss_that_is_not_finite_ends_a_training_with_the_images_of_its_step(
    make: Callable[..., Loop], reports: Reports, tmp_path: Path
) -> None:
    diverged = make(head_lr=1e30, warmup=0.0)
    reason = diverged.run()
    assert reason is not None and reason.startswith("the loss is not finite in step 2 (epoch 1)")
    written = json.loads((tmp_path / "work" / "diverged.json").read_text())
    assert (written["epoch"], written["step"], len(written["pictures"])) == (1, 2, 8)


def test_training_stops_after_epochs_without_a_better_one_and_keeps_the_best(
    make: Callable[..., Loop], reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([0.5, 0.7, 0.6, 0.6, 0.9])
    monkeypatch.setattr(loop, "scores", lambda labels, logits: {"val_ap": next(found), "val_bce": 0.5})
    kept = make(epochs=5, patience=2)
    assert kept.run() is None
    assert [record["val_ap"] for record in kept.progress.history] == [0.5, 0.7, 0.6, 0.6]
    assert kept.progress.best_epoch == 2
    (second,) = [i for i, metrics in enumerate(reports.metrics) if metrics.get("epoch") == 2]
    best = checkpoints.read_progress(reports.checkpoint(second), DIGEST).best
    assert all(torch.equal(kept.progress.best[name], value) for name, value in best.items())
    assert all(torch.equal(kept.network.state_dict()[name].cpu(), value) for name, value in best.items())


@pytest.mark.parametrize("wanted", [0, 3, 99])
def test_features_of_test_images_are_kept_if_they_are_wanted(
    wanted: int, make: Callable[..., Loop], reports: Reports
) -> None:
    failing = VAL_ROWS[-1] + 1
    trained = make(Images([failing]), failed_share=0.5, epochs=1)
    trained = replace(trained, config=replace(trained.config, leakage=wanted))
    assert trained.run() is None
    last = checkpoints.read_progress(reports.checkpoint(len(reports.metrics) - 1), DIGEST)
    if not wanted:
        assert last.features == {}
        return
    rows = last.test[checkpoints.ROWS][:wanted]
    assert len(rows) == 3 and failing not in rows
    assert EXAMPLES.text_features is not None
    trained.network.eval()
    with torch.inference_mode():
        out = trained.network(torch.from_numpy(MOSAICS[rows]), torch.from_numpy(EXAMPLES.text_features[rows]))
    torch.testing.assert_close(last.features["image"], out.image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last.features["projected"], out.projected, rtol=1e-4, atol=1e-5)


def test_penalty_is_recorded_only_where_it_has_a_weight(make: Callable[..., Loop], reports: Reports) -> None:
    plain = make(epochs=1)
    penalised = replace(make(epochs=1), loss=replace(FROZEN.loss, decorrelation_weight=0.5))
    assert plain.run() is None and penalised.run() is None
    (before,), (after,) = plain.progress.history, penalised.progress.history
    assert after.keys() - before.keys() == {"decorrelation"} and before.keys() <= after.keys()
    parts = after["contrastive"] + 0.2 * after["bce"] + 0.3 * after["alignment"] + 0.5 * after["decorrelation"]
    assert after["loss"] == pytest.approx(parts, abs=1e-5) and 0.0 < after["residual_energy"] < 1.0
