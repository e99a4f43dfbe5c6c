"""The captioner of a pass is that of the detectors that need captions, wherever in the order they stand."""

from pathlib import Path

import pytest

from jobs.pipeline.models import Models
from jobs.workflows.streams import _captioning_detector
from nsnet import bundle, recipes
from nsnet.captioner import save_tiny_captioner
from nsnet.captions import captioner_id
from nsnet.configuration import DetectorConfig, config_of
from nsnet.errors import ConfigError
from nsnet.recipes import Recipe
from tests.support.models import FROZEN, as_if_trained

SMALL = Recipe(name="small", detector=FROZEN, training=recipes.TINY.training)
LINEAR = recipes.variant(SMALL, "linear").detector
Detectors = dict[str, tuple[Models, DetectorConfig]]


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory) -> Detectors:
    """Two with equal captioners in their bundles, one with another, one that needs none."""
    folder, found = tmp_path_factory.mktemp("detectors"), {}
    for name, seed, config in (("one", 0, FROZEN), ("same", 0, FROZEN), ("other", 1, FROZEN), ("linear", 2, LINEAR)):
        captioner = folder / f"captioner-{seed}"
        if not captioner.exists():
            captioner.mkdir()
            save_tiny_captioner(captioner, seed=seed)
        as_if_trained(config, seed).save(folder / name, captioner=captioner if config is FROZEN else None)
        models = Models(detector=str(folder / name), run_id=name)
        found[name] = models, config_of(bundle.read(folder / name))
    return found


@pytest.mark.parametrize("names", [["linear", "one"], ["one", "linear"], ["linear", "one", "same"]])
def test_captioner_is_that_of_the_first_detector_that_needs_captions(names: list[str], detectors: Detectors) -> None:
    models, captioner = _captioning_detector([detectors[name] for name in names])
    own, config = detectors["one"]
    assert captioner == config.captioner and models.run_id == "one"
    folder = Path(str(own.detector)) / bundle.CAPTIONER
    assert models.captioner_folder(captioner) == folder
    assert models.captioner_id == captioner_id(captioner, folder) != captioner_id(captioner, None)


def test_detectors_without_captions_have_no_captioner(detectors: Detectors) -> None:
    assert _captioning_detector([detectors["linear"]]) == (detectors["linear"][0], None)


def test_detectors_with_different_captioners_are_refused_by_name(detectors: Detectors) -> None:
    with pytest.raises(ConfigError, match="one and .*other need different captioners"):
        _captioning_detector([detectors[name] for name in ("linear", "one", "other")])
