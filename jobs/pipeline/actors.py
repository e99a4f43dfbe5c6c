"""The stages that caption, embed and score, and the Ray Data actor that holds them: thin shells that turn columns into
arrays and call `nsnet`.

A stage does not change rows that already failed. Pixels travel as fixed-length binary columns and are dropped as soon
as they are used. Rows: B of a batch; K mosaic slots, N patch side, M mosaic side, S thumbnail side.
"""

import time
from collections.abc import Callable
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

import pyarrow as pa

from jobs.pipeline.models import Models, caption_id
from jobs.pipeline.pixels import THUMBNAIL, gather, pixel_columns
from jobs.pipeline.rows import ProgressReporter, RowDicts, failed, to_table
from nsnet.errors import CaptionError

if TYPE_CHECKING:  # these modules import torch, which decoding workers do not need
    from nsnet.captioner import Captioner
    from nsnet.configuration import CaptionerConfig, DetectorConfig
    from nsnet.text_features import TextFeatures

loading = Lock()
"""Models of a process are loaded one after the other: they draw random weights from torch's only generator, and swap
modules while they import."""
CACHE_ENTRIES: Final = 65_536
"""Results that a stage caches."""


class ResultCache:
    """A cache of results by content, so that repeated bytes are computed once; evicts the oldest."""

    def __init__(self, entries: int = CACHE_ENTRIES) -> None:
        self.entries = entries
        self._values: dict[str, Any] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key] = value

    def trim(self) -> None:
        """Evict the oldest surplus entries. Call it between batches only: a batch needs all that it stored."""
        while len(self._values) > self.entries:
            del self._values[next(iter(self._values))]


class Stage(Protocol):
    """Processes table after table."""

    name: ClassVar[str]

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table of the next stage."""


MakeStage = Callable[[], Stage]
"""Makes a stage in the actor's process."""


def stage_name(make: MakeStage) -> str:
    """Name of the stage that this makes: a class, or a `functools.partial` of one."""
    stage: Any = make
    return str(getattr(stage, "func", stage).name)


class ModelActor:
    """An actor that holds all models of its pool and sends each table through their stages, one after the other.

    An actor per stage copied pixels and rows from process to process, and imported torch in each. And no share of a GPU
    suits both: the faster stage would hold its share and wait for the slower one. So a stage has a pool of its own only
    where a GPU cannot hold the models of all.

    It reports its images, the seconds of each stage and, under the name `waiting`, those without a table; except until
    the end of its first table: then it loads models.
    """

    def __init__(self, report: ProgressReporter, waiting: str, *stages: MakeStage) -> None:
        self._report, self._waiting = report, waiting
        self._stages = [make() for make in stages]
        self._ended_at: float | None = None

    def __call__(self, table: pa.Table) -> pa.Table:
        before = started = time.monotonic()
        spent: dict[str, float] = {}
        for stage in self._stages:
            table = stage(table)
            spent[stage.name] = -before + (before := time.monotonic())
        if self._ended_at is not None:
            self._report.spend(table.num_rows, **spent, **{self._waiting: started - self._ended_at})
        self._ended_at = before
        return table


class Caption:
    """A stage with the captioner that turns thumbnails into captions and drops the thumbnails.

    It loads the captioner at the first row without a known caption. Every model call has the same number of images, so
    that a caption does not depend, in its last bits, on the other rows of its block.
    """

    name: ClassVar = "captioning"

    def __init__(
        self,
        models: Models,
        config: "CaptionerConfig",
        schema: pa.Schema,
        batch_size: int,
        report: ProgressReporter,
        *,
        wanted: int | None = None,
    ) -> None:
        self.models, self.config = models, config
        self.schema, self.batch_size, self.report = schema, batch_size, report
        self.wanted = wanted
        """Bits of the runs that need captions (`jobs.dataset.schema.WANTED`); None: every row needs one."""
        self.memory = ResultCache()

    @cached_property
    def captioner(self) -> "Captioner":
        """The captioner, loaded on first use."""
        with loading:
            from nsnet.captioner import Captioner

            self.models.use_threads()
            models = self.models
            return Captioner.load(
                self.config, models.captioner_folder(self.config), models.device, precision=models.precision,
                compile_vision=models.compiled,
            )  # fmt: skip

    def __call__(self, table: pa.Table) -> pa.Table:
        rows, usable = light_rows(table)
        if self.wanted is not None:
            usable = [i for i in usable if rows[i]["wanted"] & self.wanted]
        uncaptioned = [i for i in usable if rows[i].get("caption") is None]
        for batch in in_batches(first_of_each(rows, uncaptioned, self.models, self.memory), self.batch_size):
            side = self.captioner.thumbnail_px
            captions = self.captioner.caption(gather(table, THUMBNAIL, batch, (self.batch_size, side, side, 3)))
            for i, caption in zip(batch, captions, strict=False):
                self.memory[self.models.key(rows[i])] = caption
        for i in usable:
            if rows[i].get("caption") is None:
                caption = self.memory[self.models.key(rows[i])]
                rows[i] |= {"caption": caption, "caption_run_id": self.models.run_id}
                if caption is None:
                    rows[i] = failed(rows[i], CaptionError("the captioner returned an empty caption"))
                    continue
            rows[i]["caption_id"] = caption_id(
                self.models.captioner_id, rows[i]["content_hash"], rows[i].get("transform")
            )
        self.memory.trim()
        errors = [rows[i]["error_class"] for i in usable if rows[i]["status"] == "failed"]
        self.report.passed(self.name, len(usable), errors, captioned=len(rows))
        return with_heavy(rows, table, self.schema)


class Embed:
    """A stage that adds the features of captions by the frozen text tower, so that training needs no text tower.

    Every model call has the same number of captions, as in `Caption`.
    """

    name: ClassVar = "embedding"

    def __init__(
        self, models: Models, config: "DetectorConfig", schema: pa.Schema, batch_size: int, report: ProgressReporter
    ) -> None:
        self.models, self.config = models, config
        self.schema, self.batch_size, self.report = schema, batch_size, report

    @cached_property
    def features(self) -> "TextFeatures":
        """The text tower, in fp32 (on a GPU TF32, as the captioner beside it).

        Not loaded in `__init__`: Ray reports only the text of errors raised there.
        """
        import torch

        from nsnet.clip import load_clip
        from nsnet.precision import use_matrix_units
        from nsnet.text_features import TextFeatures

        self.models.use_threads()
        use_matrix_units(torch.device(self.models.device))
        clip = load_clip(*self.models.text_tower(self.config))
        clip.model.to(self.models.device)
        return TextFeatures(clip, self.batch_size)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows, usable = light_rows(table)
        for batch in in_batches(usable, self.batch_size):
            features = self.features.of([rows[i]["caption"] for i in batch]).cpu().numpy()
            for i, feature in zip(batch, features, strict=True):
                rows[i]["text_features"] = feature.tolist()
        self.report.passed(self.name, len(usable), [], embedded=len(rows))
        return with_heavy(rows, table, self.schema)


def first_of_each(
    rows: RowDicts | dict[int, dict[str, Any]], positions: list[int], models: Models, memory: ResultCache
) -> list[int]:
    """Positions of the first row of each content that is not cached yet, among these positions."""
    first: dict[str, int] = {}
    for i in positions:
        key = models.key(rows[i])
        if key not in memory:
            first.setdefault(key, i)
    return list(first.values())


def light_rows(table: pa.Table) -> tuple[RowDicts, list[int]]:
    """Rows without the pixel columns, and the positions of those that have not failed."""
    rows: RowDicts = table.drop_columns(pixel_columns(table.column_names)).to_pylist()
    return rows, [i for i, row in enumerate(rows) if row["status"] != "failed"]


def with_heavy(rows: RowDicts, table: pa.Table, wanted: pa.Schema) -> pa.Table:
    """Rows as a table of the wanted schema, with the input's pixel columns, which are not copied."""
    return to_table(rows, wanted, {name: table.column(name) for name in pixel_columns(wanted.names)})


def in_batches(positions: list[int], size: int) -> list[list[int]]:
    return [positions[start : start + size] for start in range(0, len(positions), size)]
