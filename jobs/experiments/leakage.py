"""Leakage of a training: what its features say of the content of test images; and the mean of several trainings.

Dimensions: m test images with features, D embedding.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.dataset.path_labels import object_class
from jobs.experiments.experiment import Experiment
from jobs.runs import products
from nsnet.leakage import leakage, object_classes

if TYPE_CHECKING:  # these import torch, which takes seconds
    from jobs.training.checkpoints import Progress
    from jobs.training.examples import Examples

TARGETS = ("object_class", "caption_cluster")
FEATURES = ("u", "projected", "caption")


def measure(experiment: Experiment, examples: "Examples", progress: "Progress") -> dict[str, Any]:
    """`nsnet.leakage.leakage` of the test images whose features the training kept.

    Caption features are those of the images' own captions, also for controls and for variants without captions, if
    captions were published. Near-duplicates are in one fold.
    """
    from jobs.training.checkpoints import ROWS
    from jobs.training.examples import load_text_features
    from jobs.training.validation import IMAGE, PROJECTED

    image, projected = (progress.features[name].numpy() for name in (IMAGE, PROJECTED))
    rows = progress.test[ROWS].numpy()[: len(image)]
    text, facts = examples.text_features, experiment.facts
    if text is None and facts.product is products.CAPTIONS:
        text = load_text_features(facts.place, facts.maker, examples.table)
    columns = ("uri", "generator", "group", "content_hash")
    table = examples.table.select(columns).take(rows).to_pylist()
    source = experiment.request.source.rstrip("/")
    names = [object_class(row["uri"].removeprefix(source)[1:], row["generator"]) for row in table]
    groups = [row["content_hash"] if row["group"] is None else f"group {row['group']}" for row in table]
    return leakage(
        image, projected, None if text is None else text[rows], labels=examples.labels[rows],
        classes=object_classes(names), groups=groups,
    )  # fmt: skip


def mean(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of `measure` of several trainings on the same images; a probe that is undefined in one has no mean.

    The bounds are means too: the interval is at least as wide as that of the mean value.
    """
    return {
        "images": min(one["images"] for one in measured),
        "residual_energy": float(np.mean([one["residual_energy"] for one in measured])),
        **{
            target: {feature: _mean([one[target][feature] for one in measured]) for feature in FEATURES}
            for target in TARGETS
        },
        "label": _mean([one["label"] for one in measured]),
    }


def _mean(probes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    undefined = next((probe for probe in probes if probe["value"] is None), None)
    if undefined is not None:
        return undefined
    averaged = {
        name: float(np.mean([probe[name] for probe in probes])) for name in ("value", "low", "high", "permuted")
    }
    return {**probes[0], **averaged}
