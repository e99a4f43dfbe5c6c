"""What a training worker runs under Ray Train: epochs, validation, checkpoints.

Dimensions: n validation images, B images of this worker in a step.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import ray.train
import ray.train.torch
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from jobs import examples
from jobs.distributed import DistributedGather
from jobs.examples import Examples
from nsnet.config import from_dict
from nsnet.detector import Detector, DetectorConfig
from nsnet.errors import NsnetError
from nsnet.losses import SINGLE_PROCESS, Gather
from nsnet.metrics import average_precision
from nsnet.network import Network
from nsnet.training import TrainingConfig, build_optimizer, set_learning_rate, training_step

WEIGHTS: Final = "network.safetensors"
OPTIMIZER: Final = "optimizer.pt"
STATE: Final = "state.json"

COLLAPSED: Final = 0.05
"""Mean residual energy ‖ũ‖/‖u‖ below which the projection has removed nearly everything."""


class TrainingDivergedError(NsnetError):
    """The loss is no longer finite."""


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """Everything a worker is told; travels as JSON-ready values."""

    detector: dict[str, Any]
    training: dict[str, Any]
    seed: int
    clip_weights: str | None
    examples: str
    """URI of the prepared examples."""
    validation_ids: list[str]
    run_name: str
    board: str | None
    """Name of the progress board."""


def run(values: dict[str, Any]) -> None:
    """The training function of every worker."""
    told = WorkerConfig(**values)
    config, training = from_dict(DetectorConfig, told.detector), from_dict(TrainingConfig, told.training)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    detector = Detector.build(config, Path(told.clip_weights) if told.clip_weights else None, seed=told.seed)
    network = detector.network.to(device)
    data = _load_examples(told, config, context.get_local_rank())
    optimizer = build_optimizer(network, training)
    history: list[dict[str, Any]] = []
    first_epoch = _restore(network, optimizer, history, device)
    model = ray.train.torch.prepare_model(network)
    gather: Gather = DistributedGather() if world_size > 1 else SINGLE_PROCESS
    rows = np.flatnonzero(~data.validation)
    steps = examples.steps_per_epoch(len(rows), training.batch_size)
    for epoch in range(first_epoch, training.epochs):
        torch.manual_seed(told.seed * 1_000_003 + epoch * 1009 + rank)
        model.train()
        sums = np.zeros(5)
        for step, (part, valid) in enumerate(
            examples.epoch_rows(
                rows, batch_size=training.batch_size, seed=told.seed, epoch=epoch, rank=rank, world_size=world_size
            )
        ):
            set_learning_rate(optimizer, training, epoch * steps + step, steps * training.epochs)
            batch = data.batch(part, valid, f"{told.seed}/{epoch}")
            batch = type(batch)(*(tensor.to(device, non_blocking=True) for tensor in batch))
            losses, energy = training_step(model, batch, optimizer, config.loss, training, gather)
            values_of_step = np.array([*(float(value) for value in losses), energy])
            if not np.isfinite(values_of_step).all():
                pictures = ", ".join(data.image_ids[i] for i in part[valid])
                raise TrainingDivergedError(
                    f"epoch {epoch + 1}, step {step + 1}: the loss is not finite; pictures {pictures}"
                )
            sums += values_of_step
        logits = _validate(model, data, training.batch_size, device, rank, world_size)
        history.append(_epoch_record(epoch, sums / steps, data, logits))
        _tell(told, rank, history[-1], training.epochs)
        stop = _should_stop(history, training.patience)
        _report(network, optimizer, history, data, logits, rank)
        if stop:
            break


def _load_examples(told: WorkerConfig, config: DetectorConfig, local_rank: int) -> Examples:
    """One process per node copies the patches to a local file; all map it, then its name is removed."""
    cache = Path(tempfile.gettempdir()) / f"nsnet-examples-{told.run_name}"
    validation = set(told.validation_ids)
    barrier = torch.distributed.barrier if torch.distributed.is_initialized() else lambda: None
    if local_rank == 0:
        data = examples.load(told.examples, validation, config.patches, cache, write=True)
    barrier()
    if local_rank != 0:
        data = examples.load(told.examples, validation, config.patches, cache, write=False)
    barrier()
    if local_rank == 0:
        cache.unlink()
    return data


def _restore(
    network: Network, optimizer: torch.optim.Optimizer, history: list[dict[str, Any]], device: torch.device
) -> int:
    """Continue from the newest checkpoint, if there is one; returns the first epoch to do."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        load_weights(network, Path(folder) / WEIGHTS)
        network.to(device)
        optimizer.load_state_dict(torch.load(Path(folder) / OPTIMIZER, map_location=device, weights_only=True))
        history += json.loads((Path(folder) / STATE).read_text())["history"]
    return len(history)


def trained_weights(network: Network) -> dict[str, torch.Tensor]:
    """All weights that training changes, by name."""
    trainable = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    return {
        name: value.detach().cpu().contiguous() for name, value in network.state_dict().items() if name in trainable
    }


def load_weights(network: Network, path: Path) -> None:
    """Load what `trained_weights` gave."""
    problems = network.load_state_dict(load_file(path), strict=False)
    if problems.unexpected_keys:
        raise TrainingDivergedError(f"{path} is a checkpoint of another recipe: {problems.unexpected_keys[:3]}")


@torch.inference_mode()
def _validate(
    model: nn.Module, data: Examples, batch_size: int, device: torch.device, rank: int, world_size: int
) -> npt.NDArray[np.float64]:
    """Logits (n,) of the validation examples, in their order, on every worker."""
    model.eval()
    network = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    rows = np.flatnonzero(data.validation)
    logits = []
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        part, valid = examples.part_of(chunk, rank, world_size)
        batch = data.batch(part, valid, None)
        out = network(batch.mosaics.to(device), batch.text_features.to(device)).logit.double()
        if world_size > 1:
            out = DistributedGather()(out)
        logits.append(out.cpu().numpy()[: len(chunk)])
    return np.concatenate(logits)


def _epoch_record(
    epoch: int, means: npt.NDArray[np.float64], data: Examples, logits: npt.NDArray[np.float64]
) -> dict[str, Any]:
    labels = data.labels[data.validation]
    bce = float(np.mean(np.logaddexp(0.0, logits) - labels * logits))
    names = ("loss", "contrastive", "bce", "alignment", "residual_energy")
    record = {"epoch": epoch + 1, **{name: float(value) for name, value in zip(names, means, strict=True)}}
    return {**record, "val_ap": average_precision(labels, logits), "val_bce": bce}


def quality(record: dict[str, Any]) -> float:
    """What the best epoch is chosen by: validation AP; equal APs by the lower cross-entropy."""
    return float(record["val_ap"]) - 1e-3 * min(1.0, float(record["val_bce"]))


def _should_stop(history: list[dict[str, Any]], patience: int) -> bool:
    best = max(range(len(history)), key=lambda i: quality(history[i]))
    return patience > 0 and len(history) - 1 - best >= patience


def _tell(told: WorkerConfig, rank: int, record: dict[str, Any], epochs: int) -> None:
    if rank != 0 or told.board is None:
        return
    line = (
        f"train: epoch {record['epoch']}/{epochs}, loss {record['loss']:.4f} (contrastive {record['contrastive']:.3f}, "
        f"bce {record['bce']:.3f}, alignment {record['alignment']:.3f}), residual energy "
        f"{record['residual_energy']:.2f}, validation AP {record['val_ap']:.4f}"
    )
    if record["residual_energy"] < COLLAPSED:
        line += f"\nwarning: the projection leaves {record['residual_energy']:.1%} of the image feature"
    ray.get(ray.get_actor(told.board).tell.remote(line))


def _report(
    network: Network,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
    data: Examples,
    logits: npt.NDArray[np.float64],
    rank: int,
) -> None:
    """Report to Ray Train; rank 0 hands over the checkpoint, which also holds the validation logits."""
    metrics = {**history[-1], "quality": quality(history[-1])}
    if rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_file(trained_weights(network), Path(folder) / WEIGHTS)
        torch.save(optimizer.state_dict(), Path(folder) / OPTIMIZER)
        state = {
            "history": history,
            "validation": {"labels": data.labels[data.validation].tolist(), "logits": logits.tolist()},
        }
        (Path(folder) / STATE).write_text(json.dumps(state))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
