"""Rates of one CPU and one GPU, from a JSON file. The file may come from a stranger."""

import json
import math
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Final

from jobs.storage import uris
from jobs.storage.uris import Uri
from nsnet.config import from_dict
from nsnet.errors import ConfigError
from nsnet.files import read_regular

DEFAULT_FILE: Final = Path(__file__).with_name("rates.json")
"""Rates of this release; it says of which machine they are."""
MAX_FILE_BYTES: Final = 65_536
MAX_TEXT: Final = 200
"""Most characters of a text in the file, and of the reason why a file is refused."""
MIN_RATE: Final = 1e-6
MAX_RATE: Final = 1e15
MAX_PACKAGES: Final = 20
GPU_RATES: Final = ("caption_images_per_s", "score_images_per_s", "both_images_per_s")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one CPU and one GPU do when nothing else limits them. All numbers are positive."""

    prepare_images_per_s: float
    """Images that one CPU decodes per second, with patches and thumbnail, at `prepare_megapixels`."""
    prepare_megapixels: float
    """Megapixels (10^6 pixels) of these images."""
    prepare_fixed_seconds: float
    """Seconds of these that do not grow with the megapixels: the thumbnail, the patches."""
    fetch_images_per_s: float
    """Small images that one task fetches per second: the requests alone, several at a time."""
    fetch_bytes_per_s: float
    """Bytes that one task fetches per second from large objects."""
    caption_images_per_s: float
    """Images that one GPU captions per second when it does nothing else."""
    score_images_per_s: float
    """Images that one GPU scores per second when it does nothing else."""
    both_images_per_s: float | None
    """Images that one GPU both captions and scores per second; null: computed from the two alone."""
    write_images_per_s: float
    """Rows that one writing task writes per second."""
    serial_images_per_s: float
    """Images per second of the steps that one process does: listing and planning before, publishing after."""
    startup_seconds: float
    """Seconds until the first image: workers start, models load. Not the time to get machines."""
    efficiency: float
    """Throughput of the stream divided by that of its slowest stage alone, at most 1."""
    task_bytes: float
    """Memory of a task with its decoding process, in bytes."""
    actor_bytes: float
    """Host memory of a model actor, in bytes."""
    store_image_bytes: float
    """Bytes of one image between two stages, in Ray's object store."""

    def __post_init__(self) -> None:
        for name in NAMES:
            value = getattr(self, name)
            if value is not None and not MIN_RATE <= value <= MAX_RATE:  # also refuses NaN
                raise ConfigError(f"{name} must be between {MIN_RATE:g} and {MAX_RATE:g}, got {value:g}")
        if not 0.01 <= self.efficiency <= 1.0:
            raise ConfigError(f"efficiency must be between 0.01 and 1, got {self.efficiency:g}")
        if self.prepare_fixed_seconds * self.prepare_images_per_s >= 1.0:
            raise ConfigError(
                f"prepare_fixed_seconds must be less than the {1.0 / self.prepare_images_per_s:g} s of a whole image, "
                f"got {self.prepare_fixed_seconds:g}"
            )
        both = self.both_images_per_s
        if both is not None and both >= min(self.caption_images_per_s, self.score_images_per_s):
            raise ConfigError(f"both_images_per_s must be less than captioning and scoring alone, got {both:g}")

    def prepare_seconds(self, megapixels: float) -> float:
        """Seconds of one CPU for an image of this size: a fixed part, and a part per megapixel."""
        growing = 1.0 / self.prepare_images_per_s - self.prepare_fixed_seconds
        return self.prepare_fixed_seconds + growing * megapixels / self.prepare_megapixels

    def fetch_seconds(self, image_bytes: float) -> float:
        """Seconds of one task for fetching an image of this size."""
        return 1.0 / self.fetch_images_per_s + image_bytes / self.fetch_bytes_per_s

    def caption_seconds(self) -> float:
        """Seconds of one GPU for captioning an image that it also scores."""
        if self.both_images_per_s is None:
            return 1.0 / self.caption_images_per_s
        return 1.0 / self.both_images_per_s - 1.0 / self.score_images_per_s


NAMES: Final = tuple(field.name for field in fields(Rates))


@dataclass(frozen=True, kw_only=True)
class RatesFile:
    """A file of rates: the numbers, and where they come from."""

    machine: str
    """The machine that the rates are of."""
    date: str
    """The day of the measurement, as 2026-11-29."""
    precision: str
    """Number format of the models on the GPU, such as bf16."""
    versions: dict[str, str]
    """Versions of the packages that matter, by name."""
    measured: tuple[str, ...]
    """Names of the rates that were measured; all others are estimates."""
    rates: Rates

    def __post_init__(self) -> None:
        texts = {"machine": self.machine, "precision": self.precision}
        if len(self.versions) > MAX_PACKAGES:
            raise ConfigError(f"versions must hold at most {MAX_PACKAGES} packages, got {len(self.versions)}")
        for name, version in self.versions.items():
            texts |= {"a name in versions": name, f"versions.{name}": version}
        for name, text in texts.items():
            if not isinstance(text, str) or not 0 < len(text) <= MAX_TEXT:
                raise ConfigError(f"{name} must be a text of 1 to {MAX_TEXT} characters")
        try:
            date.fromisoformat(self.date)
        except ValueError as error:
            raise ConfigError(f"date must be a day such as 2026-11-29, got {self.date!r}") from error
        if unknown := sorted(set(self.measured) - set(NAMES)):
            raise ConfigError(f"measured must hold names of rates, got {', '.join(unknown)}")

    @property
    def estimated(self) -> tuple[str, ...]:
        """Names of the rates that were not measured."""
        given = (name for name in NAMES if getattr(self.rates, name) is not None)
        return tuple(name for name in given if name not in self.measured)

    @property
    def gpu_was_measured(self) -> bool:
        """Whether all rates of the GPU were measured."""
        return not set(GPU_RATES) & set(self.estimated)


def load(path: Uri | None = None) -> RatesFile:
    """Read a local file of rates; None: the rates of this release.

    Raises `ConfigError` with the file and the reason if it is missing, too large, not JSON, or holds other settings
    than a `RatesFile`.
    """
    place = DEFAULT_FILE if path is None else path
    try:
        if not uris.is_local(str(place)):
            raise ConfigError("it must be a local file")
        return from_dict(RatesFile, json.loads(read_regular(place, MAX_FILE_BYTES)), "file")
    except OSError as error:
        reason = error.strerror or str(error)
    except RecursionError:
        reason = "it is nested too deeply"
    except (ValueError, OverflowError) as error:  # no JSON, no UTF-8; a whole number that no float can hold
        reason = f"it is no JSON: {error}"
    except ConfigError as error:
        reason = str(error)
    reason = " ".join(reason.split())
    shown = reason if len(reason) <= MAX_TEXT else reason[: MAX_TEXT - 1] + "…"
    raise ConfigError(f"--rates {place}: {shown}")


def check_positive(name: str, value: float, most: float) -> None:
    """Raise `ConfigError` unless a number is finite, above 0 and at most `most`."""
    if not (math.isfinite(value) and 0 < value <= most):
        raise ConfigError(f"{name} must be above 0 and at most {most:,.0f}, got {value:,g}")
