"""A local cache of the hub, as its client lays it out, with small models under the names of published ones."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file

from nsnet import captions, clip
from nsnet.captioner import save_tiny_captioner
from nsnet.configuration import CaptionerConfig, DetectorConfig
from tests.support import models

CLIP_REPOSITORY: Final = "timm/vit_base_patch32_clip_224.openai"
"""Where open_clip finds the weights of `models.NAMED`."""
CLIP_REVISION: Final = "c" * 40
BLIP_REPOSITORY: Final = "Salesforce/blip-image-captioning-base"
BLIP_REVISION: Final = captions.PINNED_REVISIONS[BLIP_REPOSITORY]
PICKLED: Final = "pytorch_model.bin"

REFERRING: Final[DetectorConfig] = replace(models.NAMED, captioner=CaptionerConfig(max_new_tokens=6))
"""A detector whose tower and captioner have public weights: its bundle holds neither."""


def add(cache: Path, repository: str, revision: str, files: Mapping[str, bytes]) -> Path:
    """Lay out files of a repository: contents by hash, and links to them by name. Returns the folder of the links."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / revision
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(revision)
    for name, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def tower_file(scratch: Path, seed: int = 0) -> Path:
    """Weights of a small tower, as the hub has them."""
    model = clip.load_clip(replace(models.FROZEN.clip, seed=seed))
    path = scratch / "open_clip_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.model.state_dict().items()}, path)
    return path


def captioner_files(scratch: Path, *, pickled: bool = True) -> dict[str, bytes]:
    """A small BLIP, as the hub has it: its weights are a pickle, and a file of documentation lies beside them."""
    scratch.mkdir(parents=True, exist_ok=True)
    save_tiny_captioner(scratch, seed=0)
    if pickled:
        torch.save(load_file(scratch / "model.safetensors"), scratch / PICKLED)
        (scratch / "model.safetensors").unlink()
    (scratch / "other.json").write_text("{}")
    return {path.name: path.read_bytes() for path in scratch.iterdir()}


def fill(cache: Path, scratch: Path) -> Path:
    """Lay out the models of `REFERRING`; returns the cache."""
    scratch.mkdir(parents=True, exist_ok=True)
    tower = tower_file(scratch)
    add(cache, CLIP_REPOSITORY, CLIP_REVISION, {tower.name: tower.read_bytes()})
    add(cache, BLIP_REPOSITORY, BLIP_REVISION, captioner_files(scratch / "blip"))
    return cache


def referring_bundle(folder: Path, scratch: Path) -> Path:
    """A bundle of `REFERRING`."""
    scratch.mkdir(parents=True, exist_ok=True)
    models.as_if_trained(REFERRING, clip_weights=tower_file(scratch)).save(folder)
    return folder


@contextmanager
def offline(cache: Path) -> Iterator[None]:
    """The hub is out of reach, and this is its cache."""
    with models.hub_at(models.closed_address(), cache):
        yield
