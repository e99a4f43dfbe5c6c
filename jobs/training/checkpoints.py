"""Checkpoints of a training: all state that a restart needs to continue with the same result.

    network.safetensors    trained weights at that step
    best.safetensors       trained weights of the best epoch so far
    optimizer.pt           AdamW's moments, read with `weights_only=True`
    validation.safetensors logits of the validation images in the best epoch; `test.safetensors` after the last epoch
    features.safetensors   features of test images, for an ablation
    state.json             step, history, running sums, digest of the settings

Random choices are functions of (seed, step), so no random generator state is saved.
"""

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.storage import reading
from nsnet.errors import UsageError
from nsnet.network import Network

WEIGHTS: Final = "network.safetensors"
BEST: Final = "best.safetensors"
OPTIMIZER: Final = "optimizer.pt"
VALIDATION: Final = "validation.safetensors"
TEST: Final = "test.safetensors"
FEATURES: Final = "features.safetensors"
STATE: Final = "state.json"
ROWS: Final = "rows"
LOGITS: Final = "logits"


class CheckpointError(UsageError):
    """A checkpoint belongs to another training, or is damaged."""


@dataclass(kw_only=True)
class Progress:
    """Progress of a training."""

    step: int = 0
    """Completed steps."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """A record of each completed epoch."""
    sums: list[float] = field(default_factory=list)
    """Sums of the current epoch's losses so far."""
    failed: int = 0
    """Images of the current epoch that failed so far."""
    ended: bool = False
    """Whether all steps are done."""
    best_epoch: int = 0
    """1, 2, …; 0: none yet."""
    mlflow_run: str | None = None
    """Id of the MLflow run, if there is one."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the best epoch."""
    validation: dict[str, Tensor] = field(default_factory=dict)
    """Rows (n,) int64 and logits (n,) fp64 of the validation images in the best epoch."""
    test: dict[str, Tensor] = field(default_factory=dict)
    """The same for the test images, with the best epoch's weights."""
    features: dict[str, Tensor] = field(default_factory=dict)
    """`validation.Judged.features` of the first test images; empty unless the request wants them."""


TENSORS: Final = {BEST: "best", VALIDATION: "validation", TEST: "test", FEATURES: "features"}


def trained_weights(network: Network) -> dict[str, Tensor]:
    """Copies of all weights that training changes, by name, on the CPU."""
    trainable = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    state = network.state_dict()
    return {name: state[name].detach().to("cpu", copy=True).contiguous() for name in sorted(trainable)}


def load_weights(network: Network, weights: dict[str, Tensor]) -> None:
    """Load the result of `trained_weights`. Raises `CheckpointError` if it is of another network."""
    expected = {name: value.shape for name, value in trained_weights(network).items()}
    given = {name: value.shape for name, value in weights.items()}
    if expected != given:
        differing = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
        raise CheckpointError(
            f"the checkpoint is of another recipe: {len(differing)} weights differ in name or shape, such as "
            f"{', '.join(differing[:3])}"
        )
    network.load_state_dict(weights, strict=False)


def settings_digest(settings: dict[str, Any]) -> str:
    """Identity of a training's settings: the SHA-256 of their JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def save(network: Network, optimizer: torch.optim.Optimizer, progress: Progress, digest: str) -> Path:
    """Write a checkpoint into a new local folder and return it; the caller removes it after the upload."""
    folder = Path(tempfile.mkdtemp(prefix="nsnet-checkpoint-"))
    save_file(trained_weights(network), folder / WEIGHTS)
    torch.save(optimizer.state_dict(), folder / OPTIMIZER)
    for name, attribute in TENSORS.items():
        if tensors := getattr(progress, attribute):
            save_file(tensors, folder / name)
    state = {name: value for name, value in vars(progress).items() if name not in TENSORS.values()}
    (folder / STATE).write_text(json.dumps({**state, "settings": digest}))
    return folder


def read_progress(folder: Path, digest: str) -> Progress:
    """The progress in a checkpoint. Raises `CheckpointError` if it is of other settings or damaged."""
    try:
        state = json.loads((folder / STATE).read_text())
        settings = state.pop("settings")
        progress = Progress(**state)
        for name, attribute in TENSORS.items():
            if (folder / name).exists():
                setattr(progress, attribute, load_file(folder / name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise _damaged(error) from error
    if settings != digest:
        raise CheckpointError("the checkpoint is of a training with other settings: choose another --out")
    if progress.best_epoch and not (progress.best and progress.validation):
        raise CheckpointError(f"the checkpoint is damaged: {BEST} or {VALIDATION} is missing")
    return progress


def restore(
    folder: Path, network: Network, optimizer: torch.optim.Optimizer, device: torch.device, digest: str
) -> Progress:
    """Load a checkpoint into network and optimizer; returns its progress. Raises `CheckpointError`."""
    progress = read_progress(folder, digest)
    try:
        weights = load_file(folder / WEIGHTS)
        moments = torch.load(folder / OPTIMIZER, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file makes torch and safetensors raise almost anything
        raise _damaged(error) from error
    load_weights(network, weights)
    try:
        optimizer.load_state_dict(moments)
    except Exception as error:  # as above
        raise _damaged(error) from error
    return progress


def _damaged(error: Exception) -> CheckpointError:
    return CheckpointError(f"the checkpoint is damaged: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def remove(folder: Path) -> None:
    """Remove a local checkpoint folder."""
    shutil.rmtree(folder, ignore_errors=True)


def load_fitted(network: Network, uri: str) -> None:
    """Load the semantic basis or caption bank, computed from all captions, into a network."""
    with reading.local_copy(uri) as path:
        network.load_state_dict(load_file(path), strict=False)
