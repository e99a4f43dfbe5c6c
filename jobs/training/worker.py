"""The training function of Ray Train: a process's network, examples and streams, handed to the loop."""

from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from jobs.cluster import resources
from jobs.training import checkpoints, examples
from jobs.training.checkpoints import Progress, load_fitted
from jobs.training.collectives import gather
from jobs.training.config import WorkerConfig
from jobs.training.examples import Examples
from jobs.training.ingest import Ingest
from jobs.training.loop import Loop
from nsnet.config import from_dict
from nsnet.detector import Detector, DetectorConfig
from nsnet.network import Network
from nsnet.preparation import PreparationConfig
from nsnet.training import TrainingConfig, build_optimizer, use_activation_checkpointing


def run(values: dict[str, Any]) -> str | None:
    """The training function of every worker; returns why training cannot go on, None where it came to its end.

    All workers return the same reason. Raise only for a failure of one worker: Ray Train retries it, and of a report
    without a checkpoint it keeps nothing.
    """
    resources.configure_data()
    with torch.random.fork_rng():
        return _loop(WorkerConfig(**values)).run()


def _loop(config: WorkerConfig) -> Loop:
    """The loop of this process, at the last checkpoint."""
    detector, training = from_dict(DetectorConfig, config.detector), from_dict(TrainingConfig, config.training)
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    known = _load_examples(config)
    network = _build(config, detector, training).to(device)
    optimizer = build_optimizer(network, training)
    progress = Progress()
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            progress = checkpoints.restore(Path(folder), network, optimizer, device, config.digest)
    return Loop(
        config=config,
        training=training,
        loss=detector.loss,
        network=network,
        model=ray.train.torch.prepare_model(network, parallel_strategy_kwargs={"broadcast_buffers": False}),
        optimizer=optimizer,
        progress=progress,
        examples=known,
        ingest=_ingest(config, training, known),
        gather=gather(),
        device=device,
    )


def _load_examples(config: WorkerConfig) -> Examples:
    table = examples.read_split(config.split)
    features = None
    if config.captions is not None:
        features = examples.load_text_features(config.captions, config.features_id, table)
    return Examples(table=table, text_features=features)


def _build(config: WorkerConfig, detector: DetectorConfig, training: TrainingConfig) -> Network:
    """The network alone: what training does not need of a detector is freed, the text tower first of all."""
    weights = Path(config.clip_weights) if config.clip_weights else None
    network = Detector.build(detector, weights, seed=config.seed).network
    if config.fitted is not None:
        load_fitted(network, config.fitted)
    if training.activation_checkpointing:
        use_activation_checkpointing(network)
    return network


def _ingest(config: WorkerConfig, training: TrainingConfig, known: Examples) -> Ingest:
    """Streams of this process's images."""
    workers = ray.train.get_context().get_world_size()
    # of the cluster as it is now: nodes come and go between one start and the next
    _, decoding = resources.training_cpus(resources.cluster_shares(), workers)
    return Ingest(
        examples=known,
        preparation=from_dict(PreparationConfig, config.preparation),
        source=config.source,
        seed=config.seed,
        augmentation=training.augmentation,
        task_cpus=config.task_cpus,
        cpus=decoding / workers,
        memory_bytes=resources.streaming_bytes() // workers,
    )
