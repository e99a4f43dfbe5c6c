"""Detectors of one pass: the rows of each are those that it makes alone, to the last bit."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.dataset import schema
from jobs.pipeline.actors import Caption
from jobs.pipeline.models import Models
from jobs.pipeline.pixels import mosaic_column, with_pixels
from jobs.pipeline.preparing import Prepare
from jobs.pipeline.rows import ProgressReporter
from jobs.pipeline.scoring import Judge, Score
from jobs.pipeline.stream import SCORING_COLUMNS
from nsnet import recipes
from nsnet.calibration import Calibration, OperatingPoint
from nsnet.configuration import DetectorConfig
from nsnet.errors import CaptionError
from nsnet.patches import PatchConfig
from nsnet.preparation import PreparationConfig, assemble_mosaics, prepare
from nsnet.recipes import Recipe
from tests.support.models import ARCHITECTURE, FROZEN, as_if_trained
from tests.support.tables import image_file, put, todo_row, todo_table

REPORT = ProgressReporter()
SIZE = 4
LINEAR = recipes.variant(Recipe(name="small", detector=FROZEN, training=recipes.TINY.training), "linear").detector
VISION = ARCHITECTURE["vision_cfg"]
CONFIGS: dict[str, DetectorConfig] = {
    "one": FROZEN,
    "finer": replace(FROZEN, patches=PatchConfig(patch_px=16, mosaic_px=64, spectrum="power")),
    "linear": LINEAR,  # it needs no captions
    "larger": replace(
        FROZEN,
        clip=replace(FROZEN.clip, architecture=ARCHITECTURE | {"vision_cfg": VISION | {"image_size": 96}}),
        patches=PatchConfig(patch_px=32, mosaic_px=96),
    ),
}
GONE = ("run_id", "scored_at")
"""What differs between two runs in any case."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("detectors")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        as_if_trained(config, seed).save(folder / name)
    return {name: folder / name for name in CONFIGS}


@pytest.fixture(scope="module")
def todo(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    folder = tmp_path_factory.mktemp("images")
    files = {f"{i}.png": image_file(i, "PNG", 150, 130) for i in range(7)} | {"text.png": b"no image"}
    put(str(folder), files)
    return todo_table(*(todo_row(folder / name) for name in files))


def verdicts(
    bundles: dict[str, Path],
    todo: pa.Table,
    names: Sequence[str],
    wanted: Sequence[int] | None = None,
    views: int = 1,
    captions: Sequence[str | None] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Rows by detector of a pass with these; `wanted`: bits of each row, all by default."""
    judges, geometries = [], tuple(dict.fromkeys(CONFIGS[name].patches for name in names))
    for bit, name in enumerate(names):
        first = geometries.index(CONFIGS[name].patches) * views
        judges.append(
            Judge(
                detector=str(bundles[name]), detector_id=None, run_id=name, wanted=1 << bit,
                mosaics=tuple(mosaic_column(first + view) for view in range(views)),
                needs_captions=CONFIGS[name].projection.needs_captions,
            )
        )  # fmt: skip
    captioned = sum(judge.wanted for judge in judges if judge.needs_captions)
    config = PreparationConfig(thumbnail_px=64 if captioned else 0, patches=geometries, views=views, provenance=True)
    bits = pa.array(wanted or [2 ** len(names) - 1] * len(todo), pa.int64())
    table = todo.set_column(todo.schema.get_field_index("wanted"), schema.WANTED, bits)
    models = Models(threads=1, run_id="pass", captioner_id="c" * 16)
    table = Prepare(config=config, schema=with_pixels(SCORING_COLUMNS, config))(table)
    if captioned:
        keep = with_pixels(SCORING_COLUMNS, replace(config, thumbnail_px=0))
        caption = Caption(models, FROZEN.captioner, keep, SIZE, REPORT, wanted=captioned)
        if captions is not None:
            vars(caption)["captioner"] = Captions(captions)
        table = caption(table)
    rows = Score(models, judges, SIZE, REPORT)(table).to_pylist()
    return {name: [row for row in rows if row["run_id"] == name] for name in names}


class Captions:
    """Stands for the captioner: these captions, in order."""

    thumbnail_px = 64

    def __init__(self, captions: Sequence[str | None]) -> None:
        self._captions = list(captions)

    def caption(self, thumbnails: Any) -> list[str | None]:
        return [self._captions.pop(0) if self._captions else "more" for _ in thumbnails]


def same(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in GONE} for row in rows]


@pytest.mark.parametrize("views", [1, 2])
def test_rows_of_a_pass_are_those_of_each_detector_alone(bundles: dict[str, Path], todo: pa.Table, views: int) -> None:
    together = verdicts(bundles, todo, [*CONFIGS], views=views)
    for name in CONFIGS:
        alone = verdicts(bundles, todo, [name], views=views)[name]
        assert len(alone) == len(todo)
        expected = [row | ({"caption_run_id": "pass"} if row["caption"] else {}) for row in same(alone)]
        assert same(together[name]) == expected
    assert {row["caption"] for row in together["linear"]} == {None}
    assert len({row["logit"] for rows in together.values() for row in rows}) == len(CONFIGS) * 7 + 1


def test_each_detector_gets_rows_of_the_images_that_its_run_wants(bundles: dict[str, Path], todo: pa.Table) -> None:
    names, wanted = ["one", "linear"], [1, 2, 3, 1, 2, 3, 3, 2]
    every = verdicts(bundles, todo, names)
    chosen = verdicts(bundles, todo, names, wanted)
    for bit, name in enumerate(names):
        expected = [row for row, bits in zip(same(every[name]), wanted, strict=True) if bits >> bit & 1]
        assert same(chosen[name]) == expected


def test_image_without_a_caption_fails_for_detectors_that_need_one_only(
    bundles: dict[str, Path], todo: pa.Table
) -> None:
    rows = verdicts(bundles, todo, ["linear", "one"], captions=["a dog", None, *"abcde"])
    assert [row["error_class"] for row in rows["one"]] == [
        None,
        CaptionError.__name__,
        *[None] * 5,
        "ImageUnidentifiedError",
    ]
    assert same(rows["linear"]) == same(verdicts(bundles, todo, ["linear"])["linear"])


def test_views_are_judged_one_by_one_and_the_first_decides(
    bundles: dict[str, Path], todo: pa.Table, tmp_path: Path
) -> None:
    plain, views = (verdicts(bundles, todo, ["one"], views=n)["one"] for n in (1, 3))
    added = ("prob_spread", "views_agree")
    assert all(row[name] is None for row in plain for name in added)
    assert [{**row, **dict.fromkeys(added)} for row in same(views)] == same(plain)
    detector = as_if_trained(FROZEN, 0)
    for row in views[:7]:
        assert 0 < row["prob_spread"] < 1 and row["views_agree"] in (True, False)
    spreads = [row["prob_spread"] for row in views[:7]]
    # a threshold between the views of one image, and beyond all others, makes that image's views disagree
    middle = views[int(np.argmax(spreads))]
    low, high = middle["prob_fake"] - middle["prob_spread"], middle["prob_fake"] + middle["prob_spread"]
    found = set()
    for threshold in np.linspace(max(low, 1e-6), min(high, 1 - 1e-6), 25):
        for disagreement in ("ignored", "uncertain"):
            point = OperatingPoint(disagreement=disagreement)  # type: ignore[arg-type]
            calibration = Calibration(temperature=0.5, threshold=float(threshold), fitted_on=10, point=point)
            calibrated = detector.set_calibration(calibration)
            config = PreparationConfig(patches=(FROZEN.patches,), views=3)
            prepared = prepare(Path(middle["uri"]).read_bytes(), config)
            mosaics = [mosaic[None] for mosaic in assemble_mosaics(prepared.patches, config, 0)]
            scores = calibrated.score_views(mosaics, [middle["caption"]])
            probs = [calibrated.score(mosaic, [middle["caption"]]).prob_fake[0] for mosaic in mosaics]
            assert scores.views_agree is not None and scores.prob_spread is not None
            assert scores.prob_fake[0] == probs[0] and scores.prob_spread[0] == max(probs) - min(probs)
            agree = len({prob >= threshold for prob in probs}) == 1
            assert scores.views_agree[0] == agree
            plain_verdict = "fake" if probs[0] >= threshold else "real"
            uncertain = not agree and disagreement == "uncertain"
            assert scores.verdict == ["uncertain" if uncertain else plain_verdict]
            found.add(agree)
    assert found == {True, False}
