"""Compute the golden numbers; `python -m tests.golden.compute` prints them as JSON.

A child process with fixed kernels (`FIXED_KERNELS`) computes, so that the numbers do not depend on the machine.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).parent
REPO_ROOT: Final = FOLDER.parents[1]
LEFT: Final = FOLDER / "left"
FIXED_KERNELS: Final = {
    "ATEN_CPU_CAPABILITY": "default",
    "DNNL_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
}
"""Environment under which torch uses the same kernels on every x86-64 machine."""
TRAINING: Final = "s3://end-to-end/training"
"""Where the end-to-end test puts the images of the training; image ids, and so their order, depend on it."""
TRAINING_SCENES: Final = range(40)
EPOCHS: Final = 2
BATCH: Final = 8
STEPS: Final = EPOCHS * 2 * len(TRAINING_SCENES) // BATCH
SCENE_PX: Final = 224
LOSSES: Final = ("loss", "contrastive", "bce", "alignment", "residual_energy")


def fixed_bundle(folder: Path) -> Path:
    """The bundle of `left/`, completed by its CLIP, whose weights `exact_weights` makes anew; 6 MB."""
    import shutil

    shutil.copytree(LEFT / "bundle", folder)
    write_exact_clip(folder / "clip")
    return folder


def write_exact_clip(folder: Path) -> None:
    """A small CLIP in open_clip's format, whose weights are the same bits on every machine."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from nsnet.clip import WEIGHTS_FILE, load_clip
    from tests.support.models import FROZEN

    load_clip(FROZEN.clip).save(folder)
    shapes = {name: tensor.shape for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    rng = np.random.default_rng(20261128)
    weights = {}
    for name in sorted(shapes):  # integers over powers of two: no rounding, and no library's normal distribution
        centre = 1.0 if ".ln_" in name and name.endswith(".weight") else 0.0
        weights[name] = np.asarray(centre + rng.integers(-1024, 1025, shapes[name]) / 4096, dtype=np.float32)
    save_file(weights, folder / WEIGHTS_FILE)


def losses() -> list[dict[str, float]]:
    """Losses of each step of `tiny` on the drawn images, by one process, as training records them."""
    import numpy as np
    import torch

    from jobs.dataset import synthetic
    from jobs.dataset.manifest import image_id
    from jobs.training.order import Order, image_seed
    from nsnet import transforms
    from nsnet.captioner import Captioner
    from nsnet.detector import Detector
    from nsnet.preparation import PreparationConfig, assemble_mosaics, prepare
    from nsnet.recipes import TINY
    from nsnet.training import Batch, build_optimizer, set_learning_rate, training_step

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        synthetic.write_bucket(root / "train", TRAINING_SCENES, seed=0, size_px=SCENE_PX, processes=1)
        drawn = {f"{TRAINING}/{path.relative_to(root)}": path.read_bytes() for path in root.rglob("*.jpg")}
    ids = {image_id(uri, hashlib.md5(content).hexdigest()): uri for uri, content in drawn.items()}
    names = sorted(ids)
    files = [drawn[ids[name]] for name in names]
    labels = np.array(["1_fake" in ids[name] for name in names], dtype=np.int64)

    detector = Detector.build(TINY.detector, seed=0)
    captioner = Captioner.load(TINY.detector.captioner, None)
    wanted = PreparationConfig(thumbnail_px=captioner.thumbnail_px, patches=(TINY.detector.patches,))
    prepared = [prepare(file, wanted) for file in files]
    captions = [captioner.caption(each.thumbnail[None])[0] or "" for each in prepared]
    features = detector.clip.encode_text(captions)

    order = Order(rows=np.arange(len(names)), batch_size=BATCH, seed=0, rank=0, world_size=1)
    optimizer = build_optimizer(detector.network, TINY.training)
    detector.network.train()
    found = []
    for step in range(STEPS):
        rows, valid = order.part(step)
        mosaics = []
        for row in rows:
            seed = image_seed(0, order.epoch(step), names[row])
            assert transforms.draw(TINY.training.augmentation, seed) == ()
            mosaics += assemble_mosaics(prepared[row].patches, wanted, seed)
        batch = Batch(
            mosaics=torch.from_numpy(np.stack(mosaics)),
            text_features=features[torch.from_numpy(rows)],
            labels=torch.from_numpy(labels[rows]),
            valid=torch.from_numpy(valid),
        )
        set_learning_rate(optimizer, TINY.training, step, STEPS)
        values, energy = training_step(
            detector.network, batch, optimizer, TINY.detector.loss, TINY.training, seed=step
        )  # fmt: skip
        assert float(values.decorrelation) == 0.0
        numbers = [*(float(value) for value in values[:4]), float(energy) / len(rows)]
        found.append({name: round(number, 7) for name, number in zip(LOSSES, numbers, strict=True)})
    return found


def verdicts() -> dict[str, dict[str, Any]]:
    """Verdicts of the fixed bundle on the twelve images of `left/`, by file name."""
    from nsnet.detector import Detector

    paths = sorted((LEFT / "images").rglob("*.jpg"))
    with tempfile.TemporaryDirectory() as scratch:
        detector = Detector.load(fixed_bundle(Path(scratch) / "bundle"))
        given = detector.predict(paths)
    kept = ("caption", "verdict", "prob_fake", "logit", "residual_energy")
    return {
        path.relative_to(LEFT / "images").as_posix(): {
            name: round(value, 7) if isinstance(value := getattr(verdict, name), float) else value for name in kept
        }
        for path, verdict in zip(paths, given, strict=True)
    }


def computed() -> dict[str, Any]:
    """The numbers of this tree, by file name, from a child process with fixed kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.golden.compute"],
        cwd=REPO_ROOT, env=os.environ | FIXED_KERNELS, stdout=subprocess.PIPE, text=True, check=True, timeout=600,
    )  # fmt: skip
    values: dict[str, Any] = json.loads(done.stdout)
    return values


if __name__ == "__main__":
    json.dump({"losses.json": losses(), "verdicts.json": verdicts()}, sys.stdout)
