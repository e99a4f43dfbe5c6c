"""A published linear head on CLIP features becomes a detector whose logit is w·u + b."""

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from jobs.experiments.imported_head import import_head
from nsnet import bundle, recipes
from nsnet.detector import Detector
from nsnet.errors import ConfigError, UsageError, WeightsError
from tests.support import models
from tests.support.models import image, one_line
from tests.support.pickles import Bomb
from tests.support.tables import run_command

DIM = 32


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe `small`: the real code on a CLIP of two layers."""
    small = replace(recipes.TINY, name="small", detector=models.FROZEN)
    monkeypatch.setattr(recipes, "_NAMED", {"small": small})


def head(dim: int = DIM) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"weight": torch.randn(1, dim, generator=generator), "bias": torch.tensor([0.25])}


def written(tensors: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("name", ["head.pth", "head.safetensors"])
def test_logit_of_the_detector_is_that_of_the_head_on_the_frozen_feature(name: str, tmp_path: Path) -> None:
    path = written(head(), tmp_path / name)
    detector_id = import_head(str(path), out=str(tmp_path / "out"), recipe="small")
    description = bundle.read(tmp_path / "out")
    assert description.detector_id == detector_id
    assert description.training["imported_head"] == name and len(description.training["sha256"]) == 64

    detector = Detector.load(tmp_path / "out")
    detector.network.eval()
    mosaics = torch.from_numpy(models.mosaics(5))
    with torch.inference_mode():
        features = detector.network(mosaics)
    expected = features.image.double() @ head()["weight"].double().T + 0.25
    torch.testing.assert_close(features.logit.double(), expected.squeeze(1), rtol=0, atol=1e-5)
    assert float(expected.std()) > 1e-3
    assert detector.calibration.threshold == 0.5 and detector.calibration.temperature == 1.0


def test_image_is_judged_by_its_middle(tmp_path: Path) -> None:
    import_head(str(written(head(), tmp_path / "head.pth")), out=str(tmp_path / "out"), recipe="small")
    detector = Detector.load(tmp_path / "out")
    whole = image(0, 160, 128)
    left, top = (160 - models.SIDE_PX) // 2, (128 - models.SIDE_PX) // 2
    middle = whole.crop((left, top, left + models.SIDE_PX, top + models.SIDE_PX))
    framed = Image.new("RGB", whole.size, "red")
    framed.paste(middle, (left, top))
    other = Image.fromarray(np.asarray(whole)[::-1, ::-1].copy())
    logits = [verdict.logit for verdict in detector.predict([whole, middle, framed, other])]
    assert logits[1:3] == pytest.approx([logits[0]] * 2, abs=1e-5)
    assert abs(logits[3] - logits[0]) > 1e-3


def test_image_is_squashed_and_normalised_as_imagenet_if_the_head_was_trained_so(tmp_path: Path) -> None:
    path = written(head(), tmp_path / "head.pth")
    import_head(str(path), out=str(tmp_path / "out"), recipe="small", variant="linear:resize")
    detector = Detector.load(tmp_path / "out")
    assert detector.config.normalisation == "imagenet"
    whole = image(0, 160, 128)
    squashed = whole.resize((models.SIDE_PX, models.SIDE_PX), Image.Resampling.BILINEAR)
    logits = [verdict.logit for verdict in detector.predict([whole, squashed, whole.crop((48, 32, 112, 96))])]
    assert logits[0] == pytest.approx(logits[1], abs=1e-5)
    assert abs(logits[2] - logits[0]) > 1e-3  # type: ignore[operator]


@pytest.mark.parametrize(
    ("variant", "message"),
    [("advanced", "has no linear head: choose linear or linear:resize"), ("linear:crop", "'crop' is no input")],
)
def test_variant_without_a_linear_head_is_refused(variant: str, message: str, tmp_path: Path) -> None:
    path = written(head(), tmp_path / "head.pth")
    with pytest.raises(ConfigError, match=message) as caught:
        import_head(str(path), out=str(tmp_path / "out"), recipe="small", variant=variant)
    one_line(caught.value)
    assert not (tmp_path / "out").exists()


def test_verdict_for_people_names_no_caption(tmp_path: Path) -> None:
    import_head(str(written(head(), tmp_path / "head.pth")), out=str(tmp_path / "out"), recipe="small")
    image(0).save(tmp_path / "a.png")
    code, output, _ = run_command("predict", str(tmp_path / "a.png"), "--detector", str(tmp_path / "out"))
    assert code == 0 and output.count("\n") == 2 and output.endswith("  96 × 80 px PNG\n")


@pytest.mark.parametrize(
    "tensors",
    [
        head(DIM + 1),
        {"weight": torch.zeros(2, DIM), "bias": torch.zeros(2)},
        {"weight": torch.zeros(1, DIM)},
        {"fc.weight": torch.zeros(1, DIM), "fc.bias": torch.zeros(1)},
        {},
    ],
    ids=["another CLIP's", "two classes", "no bias", "other names", "nothing"],
)
def test_head_that_does_not_fit_is_refused_with_both_shapes(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    message = refused(written(tensors, tmp_path / "head.pth"), tmp_path)
    assert "'weight': (1, 32)" in message and "'bias': (1,)" in message


@pytest.mark.parametrize(
    "kind", ["pickle", "torch", "nested", "text", "empty", "safetensors", "missing", "number", "fifo"]
)
def test_file_that_is_no_head_is_refused_and_never_unpickled(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("head.safetensors" if kind == "safetensors" else "head.pth")
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(), protocol=2))
    elif kind == "torch":
        torch.save({"weight": Bomb()}, path)
    elif kind == "nested":
        torch.save({"weight": {"weight": torch.zeros(1, DIM)}}, path)
    elif kind == "number":
        torch.save(torch.zeros(3), path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "missing":
        path.write_bytes(b"" if kind == "empty" else b"no tensors in here")
    assert str(path) in refused(path, tmp_path)


def refused(path: Path, folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        import_head(str(path), out=str(folder / "out"), recipe="small")
    assert not (folder / "out").exists()
    return one_line(caught.value)


def test_place_with_a_detector_is_left_alone(tmp_path: Path) -> None:
    path = str(written(head(), tmp_path / "head.pth"))
    before = import_head(path, out=str(tmp_path / "out"), recipe="small")
    with pytest.raises(UsageError, match="already holds a detector"):
        import_head(path, out=str(tmp_path / "out"), recipe="small")
    assert bundle.read(tmp_path / "out").detector_id == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer to weights: run `git lfs pull`"),
        (b"<!DOCTYPE html><html>", "an HTML page: download the file itself"),
        (b"", "empty: download it again"),
    ],
    ids=["lfs", "html", "empty"],
)
def test_head_in_another_format_is_named_as_what_it_is(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "fc_weights.pth"
    path.write_bytes(content)
    assert message in refused(path, tmp_path)
