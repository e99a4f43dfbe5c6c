"""Make a bundle from a published linear head on CLIP features, such as UniversalFakeDetect's."""

import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from jobs.console.output import say
from jobs.pipeline.models import Models
from jobs.storage import listing, probes, uris, writing
from jobs.storage.uris import Uri
from nsnet import recipes, weight_formats
from nsnet.bundle import DESCRIPTION
from nsnet.detector import Detector
from nsnet.digest import file_digest
from nsnet.errors import ConfigError, UsageError, WeightsError


def import_head(
    head: Uri,
    *,
    out: Uri,
    recipe: str = "vit-l-14",
    variant: str = "linear",
    clip_weights: Uri | None = None,
    weights: Uri | None = None,
) -> str:
    """Write the bundle; returns the detector's id. `variant`: `linear` or `linear:resize`, the head's input.

    Raises `WeightsError` if head and tower do not fit.
    """
    config = recipes.variant(recipes.get(recipe), variant).detector
    if config.head.kind != "linear":
        raise ConfigError(f"variant {variant!r} has no linear head: choose linear or linear:resize")
    probes.check_output(out)
    if listing.exists(uris.join(out, DESCRIPTION)):
        raise UsageError(f"{out} already holds a detector; choose another --out")
    path = Path(head)
    tensors = _read(path)
    models = Models(clip_weights=clip_weights, weights=weights)
    detector = Detector.build(config, models.clip_path(config))
    expected = {name: tuple(value.shape) for name, value in detector.network.head.classifier.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    if given != expected:
        raise WeightsError(f"{path} holds {given}; a linear head of {config.clip.model} has {expected}")
    detector.network.head.classifier.load_state_dict(tensors)
    origin = {"imported_head": path.name, "sha256": file_digest(path), "recipe": recipe, "variant": variant}
    with tempfile.TemporaryDirectory() as scratch:
        described = detector.save(Path(scratch) / "bundle", training=origin)
        writing.upload_folder(Path(scratch) / "bundle", out, last=DESCRIPTION)
    say(f"detector {described.detector_id}: {out}")
    return described.detector_id


def _read(path: Path) -> dict[str, Any]:
    """The tensors of an untrusted file."""
    if not path.exists():
        raise WeightsError(f"there is no file {path}")
    try:
        weight_formats.check(path)
        loaded = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        return {name: value.float() for name, value in dict(loaded).items()}
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than tensors, or is damaged; for safety only tensors are read"
        ) from error
    except (SafetensorError, RuntimeError, ValueError, TypeError, AttributeError, EOFError, OSError) as error:
        raise WeightsError(
            f"{path} is not a file of tensors: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
