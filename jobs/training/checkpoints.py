"""The state of a training: all that is needed to go on at a step as if nothing had happened.

    network.safetensors    trained weights at that step
    best.safetensors       those of the best epoch so far
    optimizer.pt           AdamW's moments, read with `weights_only=True`
    validation.safetensors logits of the validation images in the best epoch; `test.safetensors` once it is over
    state.json             step, history, running sums, digest of the settings

Random choices are functions of (seed, step), so no generator's state is kept.
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
STATE: Final = "state.json"
ROWS: Final = "rows"
LOGITS: Final = "logits"


class CheckpointError(UsageError):
    """A checkpoint is of another training, or damaged."""


@dataclass(kw_only=True)
class Progress:
    """How far a training is."""

    step: int = 0
    """Steps that are done."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """A record of each epoch that is done."""
    sums: list[float] = field(default_factory=list)
    """Of the losses of the present epoch so far."""
    failed: int = 0
    """Images of the present epoch that could not be had so far."""
    ended: bool = False
    """No further step is to be done."""
    best_epoch: int = 0
    """1, 2, …; 0: none yet."""
    mlflow_run: str | None = None
    """The run of the MLflow server, if there is one."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the best epoch."""
    validation: dict[str, Tensor] = field(default_factory=dict)
    """Rows (n,) int64 and logits (n,) fp64 of the validation images in the best epoch."""
    test: dict[str, Tensor] = field(default_factory=dict)
    """The same of the test images, by the best epoch's weights."""


TENSORS: Final = {BEST: "best", VALIDATION: "validation", TEST: "test"}


def trained_weights(network: Network) -> dict[str, Tensor]:
    """Copies of all weights that training changes, by name, on the CPU."""
    trainable = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    state = network.state_dict()
    return {name: state[name].detach().to("cpu", copy=True).contiguous() for name in sorted(trainable)}


def load_weights(network: Network, weights: dict[str, Tensor]) -> None:
    """Load what `trained_weights` gave. Raises `CheckpointError` where it is of another network."""
    expected = {name: value.shape for name, value in trained_weights(network).items()}
    found = {name: value.shape for name, value in weights.items()}
    if expected != found:
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise CheckpointError(
            f"the checkpoint is of another recipe: {len(differing)} weights differ in name or shape, such as "
            f"{', '.join(differing[:3])}"
        )
    network.load_state_dict(weights, strict=False)


def settings_digest(settings: dict[str, Any]) -> str:
    """Identity of a training's settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def save(network: Network, optimizer: torch.optim.Optimizer, progress: Progress, digest: str) -> Path:
    """Write a checkpoint into a new folder of this machine; whoever uploads it removes it."""
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
    """What a checkpoint says of the progress. Raises `CheckpointError`: of other settings, or damaged."""
    try:
        state = json.loads((folder / STATE).read_text())
        of = state.pop("settings")
        progress = Progress(**state)
        for name, attribute in TENSORS.items():
            if (folder / name).exists():
                setattr(progress, attribute, load_file(folder / name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise _damaged(error) from error
    if of != digest:
        raise CheckpointError("the checkpoint is of a training with other settings: choose another --out")
    if progress.best_epoch and not (progress.best and progress.validation):
        raise CheckpointError(f"the checkpoint is damaged: {BEST} or {VALIDATION} is missing")
    return progress


def restore(
    folder: Path, network: Network, optimizer: torch.optim.Optimizer, device: torch.device, digest: str
) -> Progress:
    """Put a checkpoint back. Raises `CheckpointError`."""
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
    """Remove a checkpoint of this machine."""
    shutil.rmtree(folder, ignore_errors=True)


def load_fitted(network: Network, uri: str) -> None:
    """Put what was computed from all captions, basis or bank, into a network."""
    with reading.local_copy(uri) as path:
        network.load_state_dict(load_file(path), strict=False)
