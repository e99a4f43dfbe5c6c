"""The training function of Ray Train: build a process's network, examples and streams, and run the loop."""

from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from jobs.cluster import resources
from jobs.cluster.shares import training_cpus
from jobs.pipeline.models import Models
from jobs.training import checkpoints, examples
from jobs.training.checkpoints import Progress, load_fitted
from jobs.training.collectives import gather
from jobs.training.config import WorkerConfig
from jobs.training.examples import Examples
from jobs.training.ingest import Ingest
from jobs.training.loop import Loop
from nsnet.config import from_dict
from nsnet.configuration import DetectorConfig, TrainingConfig
from nsnet.detector import Detector
from nsnet.network import Network
from nsnet.preparation import PreparationConfig
from nsnet.training import build_optimizer, use_activation_checkpointing


def run(values: dict[str, Any]) -> str | None:
    """Train on one worker; returns None at the end, else the reason why training must stop.

    All workers return the same reason. Raises only for a failure of one worker, which Ray Train retries; a fatal reason
    is returned because Ray Train drops a report without a checkpoint.
    """
    resources.configure_data()
    with torch.random.fork_rng():
        return _loop(WorkerConfig(**values)).run()


def _loop(config: WorkerConfig) -> Loop:
    """The loop of this process, restored from the last checkpoint."""
    detector, training = from_dict(DetectorConfig, config.detector), from_dict(TrainingConfig, config.training)
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    loaded = _load_examples(config)
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
        examples=loaded,
        ingest=_ingest(config, training, loaded),
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
    """The network; the rest of the detector, such as the text tower, is freed because training does not need it."""
    models = Models(clip_weights=config.clip_weights, text_weights=config.text_weights, weights=config.weights)
    network = Detector.build(detector, seed=config.seed, **models.tower_paths(detector)).network
    if config.fitted is not None:
        load_fitted(network, config.fitted)
    if training.activation_checkpointing:
        use_activation_checkpointing(network)
    return network


def _ingest(config: WorkerConfig, training: TrainingConfig, loaded: Examples) -> Ingest:
    """Streams of this process's images."""
    workers = ray.train.get_context().get_world_size()
    # of the current cluster: nodes may join and leave between restarts
    _, decoding = training_cpus(resources.cluster_shares(), workers)
    return Ingest(
        examples=loaded,
        preparation=from_dict(PreparationConfig, config.preparation),
        source=config.source,
        seed=config.seed,
        augmentation=training.augmentation,
        task_cpus=config.task_cpus,
        cpus=decoding / workers,
        memory_bytes=resources.streaming_bytes() // workers,
    )
