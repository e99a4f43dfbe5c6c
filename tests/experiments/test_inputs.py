"""What a training needs: a wrong request is found before every image is looked at."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.dataset.schema import SPLIT
from jobs.experiments import basis, inputs
from jobs.experiments.experiment import Experiment
from jobs.experiments.request import TrainRequest
from jobs.storage.uris import Uri
from jobs.training.examples import Examples
from nsnet.errors import ConfigError, NullSpaceError, SourceError, WeightsError
from tests.support.models import one_line
from tests.support.tables import image_file, put


class LookedAt(Exception):
    """Every image was about to be looked at."""


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainRequest:
    """A training on twelve images of two generators."""

    def look(*_: object) -> None:
        raise LookedAt

    monkeypatch.setattr(inputs, "publish_facts", look)
    files = {f"{g}/{name}/{i}.png": image_file(i) for g in "ab" for name in ("0_real", "1_fake") for i in range(3)}
    return TrainRequest(source=put(str(tmp_path / "pictures"), files), out=Uri(str(tmp_path / "out")))


def prepare(request: TrainRequest) -> Any:
    return inputs.examples_of(Experiment.resolve(request))


def test_missing_weights_are_found_before_the_source_is_listed(
    request_: TrainRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(*_: object) -> None:
        pytest.fail("the source was listed")

    monkeypatch.setattr(inputs, "write_manifest", listed)
    with pytest.raises(WeightsError, match="nowhere"):
        prepare(replace(request_, captioner=Uri(str(tmp_path / "nowhere"))))


def test_id_of_the_facts_is_computed_once(request_: TrainRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their id contains digests of all weights, which take a second for each GB."""
    found: list[str] = []

    def features_id(*_: object) -> str:
        found.append("id")
        return "id"

    monkeypatch.setattr("jobs.experiments.experiment.features_id", features_id)
    experiment = Experiment.resolve(request_)
    assert experiment.with_recipe(experiment.recipe).facts == experiment.facts and found == ["id"]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"leave_out": "c"},
            ConfigError,
            "cannot leave out the generator 'c': it has no image; choose one of the generators: a, b",
        ),
        ({"split": "/nowhere/split.parquet"}, SourceError, "there is no split /nowhere/split.parquet"),
        (
            {"operating_point": "fpr<=1%@95%"},
            ConfigError,
            "needs at least 299 real validation images, there are 6 reals in the whole source: add reals",
        ),
        ({"workers": (1, 7)}, SourceError, "12 images are too few for 7 workers: at least two for each"),
    ],
)
def test_wrong_request_is_found_before_images_are_looked_at(
    changed: dict[str, Any], error: type[Exception], message: str, request_: TrainRequest
) -> None:
    with pytest.raises(error, match=message) as caught:
        prepare(replace(request_, **changed))
    one_line(caught.value)


def test_right_request_goes_on_to_look_at_them(request_: TrainRequest) -> None:
    for changed in ({}, {"leave_out": "b"}, {"workers": (1, 6)}):
        with pytest.raises(LookedAt):
            prepare(replace(request_, **changed))


def test_source_of_one_class_or_without_labels_is_refused(request_: TrainRequest, tmp_path: Path) -> None:
    one = put(str(tmp_path / "one"), {f"0_real/{i}.png": image_file(i) for i in range(6)})
    with pytest.raises(SourceError, match="the source has 6 real and 0 fake images; both are needed"):
        prepare(replace(request_, source=one))
    none = put(str(tmp_path / "none"), {f"{i}.png": image_file(i) for i in range(6)})
    with pytest.raises(SourceError, match="6 of 6 images have no label"):
        prepare(replace(request_, source=none))


def test_directions_that_leave_nothing_are_refused_with_the_ranks_that_are_possible(request_: TrainRequest) -> None:
    """Before workers start, each of which would find it out, and be started again."""
    request = replace(request_, variant="rank-k:8")
    table = SPLIT.empty_table()
    found = Examples(table=table, text_features=np.zeros((0, 8), dtype=np.float32))
    with pytest.raises(NullSpaceError, match="choose a rank of 1 to 7"):
        basis.fit_projection(Experiment.resolve(request), found)


def test_source_that_cannot_be_read_whole_is_refused_unless_that_is_allowed(request_: TrainRequest) -> None:
    """Who trains on a part of a source, without a warning, believes numbers of another data set."""
    put(request_.source, {"a/0_real/cut.tar": b"no tar" * 200})
    with pytest.raises(SourceError, match=r"1 folders or containers .* \(--max-left-out\): .*cut\.tar") as caught:
        prepare(request_)
    one_line(caught.value)
    assert not Path(request_.work, "split.parquet").exists()
    with pytest.raises(LookedAt):
        prepare(replace(request_, max_left_out=1))


def test_allowance_does_not_make_another_training_of_it(request_: TrainRequest) -> None:
    recipe = request_.resolved()
    assert replace(request_, max_left_out=7).identity(recipe) == request_.identity(recipe)
