"""Options that several commands share, and their types."""

import os
import re
from collections.abc import Callable
from typing import Any, Final

import click

from jobs.console import output
from jobs.storage import uris
from jobs.storage.uris import Uri
from nsnet.digest import is_digest
from nsnet.limits import MAX_VIEWS, DecodeLimits

COUNT_PATTERN: Final = re.compile(r"([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+(?:_[0-9]+)*)(?:\.([0-9]+))?([kKmMbB]?)")
COUNT_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
MAX_COUNT_LETTERS: Final = 30
MAX_DIGEST_LETTERS: Final = 80
DURATION_PATTERN: Final = re.compile(r"([0-9]{1,6})([smhd])|0")
DURATION_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class ShareType(click.ParamType[float]):
    """A share as `1%` or `0.01`."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            share = float(text[:-1]) / 100.0 if text.endswith("%") else float(text)
        except ValueError:
            self.fail(f"{value!r} is not a share such as 1% or 0.01", param, ctx)
        if not 0.0 <= share <= 1.0:
            self.fail(f"{value!r} is not between 0 and 100%", param, ctx)
        return share


class CountType(click.ParamType[int]):
    """A whole number as `300`, `1,000`, `1_000`, `300k`, `2.5M` or `1B`."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip()
        match = COUNT_PATTERN.fullmatch(text) if len(text) <= MAX_COUNT_LETTERS else None
        if match is not None:
            whole, decimals, unit = match[1].replace(",", "").replace("_", ""), match[2] or "", match[3].lower()
            divisor: int = 10 ** len(decimals)
            count, rest = divmod(int(whole + decimals) * COUNT_UNITS[unit], divisor)
            if rest == 0:
                return count
        shown = repr(text[:MAX_COUNT_LETTERS])
        self.fail(f"{shown} is not a whole number such as 1000, 1,000, 300k, 2.5M or 1B", param, ctx)


class DurationType(click.ParamType[float]):
    """A time in seconds, as `90s`, `30m`, `24h`, `30d`, or `0`."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = DURATION_PATTERN.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{str(value)[:30]!r} is not a time such as 30m, 24h or 30d", param, ctx)
        return float(match[1] or 0) * DURATION_UNITS[match[2] or "s"]


class UriType(click.ParamType[Uri]):
    """The address of a file, a folder or an object, made absolute."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Uri:
        return Uri(value)


class OptionalUriType(click.ParamType["Uri | None"]):
    """As `UriType`; an empty text, such as an unset variable of a script, is None."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Uri | None:
        return Uri(value) if value else None


class DigestType(click.ParamType[str]):
    """A SHA-256 in 64 hexadecimal digits."""

    name = "sha256"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value).strip().lower()
        if not is_digest(text):
            self.fail(f"{text[:MAX_DIGEST_LETTERS]!r} is not a SHA-256 of 64 hexadecimal digits", param, ctx)
        return text


class ModelPathType(click.ParamType[Uri]):
    """The path of weights, made absolute."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Uri:
        return uris.model_path(value)


RECIPES: Final = (
    "tiny, vit-l-14, an open_clip MODEL[:TAG], timm/NAME for a tower without text, or timm/NAME+MODEL[:TAG] with the "
    "text tower of MODEL."
)
"""Help of `--recipe`."""
COUNT: Final = CountType()
DIGEST: Final = DigestType()
DURATION: Final = DurationType()
MAX_LEAKAGE_IMAGES: Final = 10_000
"""`nsnet.leakage.MAX_IMAGES`; not imported, because that takes half a second."""
URI: Final = UriType()
OPTIONAL_URI: Final = OptionalUriType()
MODEL_PATH: Final = ModelPathType()


def _stack(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


address_option = click.option(
    "--address", default=None, help="Ray cluster to use; default: the one this process runs in, else an embedded one."
)
mirror_option = click.option(
    "--weights", type=OPTIONAL_URI, default=None, envvar="NSNET_WEIGHTS",
    help="Mirror of weights (nsnet weights mirror), instead of the hub; default: NSNET_WEIGHTS.",
)  # fmt: skip
path_options = _stack(
    click.option(
        "--clip-weights", type=MODEL_PATH, default=None, help="Local path of the CLIP weights, instead of the hub's."
    ),
    click.option(
        "--text-weights",
        type=MODEL_PATH,
        default=None,
        help="Local path of the weights of a separate text tower (recipes timm/NAME+MODEL), instead of the hub's.",
    ),
    click.option(
        "--captioner",
        type=MODEL_PATH,
        default=None,
        help="Local transformers folder of a BLIP captioner, instead of the hub's.",
    ),
)
weights_options = _stack(path_options, mirror_option)
precision_option = click.option(
    "--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", show_default=True,
    help="Arithmetic of the models; auto: fp16 on a GPU, fp32 on a CPU.",
)  # fmt: skip
batch_option = click.option("--batch-size", type=int, help="Images per model call. Default: 128 on a GPU, 32 on a CPU.")
trust_option = click.option(
    "--trust-list", type=URI, help="File with certificates (PEM) whose content credentials are valid, not untrusted."
)
align_option = click.option(
    "--align", metavar="CHAIN",
    help="Also encode each image by this chain before anything else, such as jpeg:96, centre:256+jpeg:96, or "
    "lossless:jpeg:96 for lossless files alone, and show both side by side.",
)  # fmt: skip
views_option = click.option(
    "--views",
    type=click.IntRange(2, MAX_VIEWS),
    help="Mosaics to judge per image, the further ones mildly re-encoded, to see whether the verdict is stable.",
)
limit_options = _stack(
    click.option("--max-bytes", default=DecodeLimits.max_bytes, show_default=True, help="Largest file, in bytes."),
    click.option("--max-pixels", default=DecodeLimits.max_pixels, show_default=True, help="Largest image, in px."),
    click.option("--max-seconds", default=DecodeLimits.max_seconds, show_default=True, help="Longest decoding, in s."),
)


def _debug(context: click.Context, option: click.Parameter, value: bool) -> None:
    if value:
        os.environ["NSNET_DEBUG"] = "1"


debug_option = _stack(
    click.option(
        "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_debug,
        help="Show the traceback of every error, as NSNET_DEBUG=1 does.",
    ),
    click.option(
        "--log-format", type=click.Choice(output.FORMATS), default=output.FORMATS[0], show_default=True,
        envvar=output.FORMAT_VARIABLE, expose_value=False,
        help="Messages on stderr as text, or one JSON object per event.",
    ),
)  # fmt: skip
"""Options of messages; `main.run` reads the format before click does."""

column_option = click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="KEY=NAME",
    help="Name of the Parquet column for KEY (image, label, generator, uri …) if it is not KEY; repeatable.",
)
selection_options = _stack(
    click.option("--include", multiple=True, metavar="GLOB", help="Only matching paths below SOURCE; repeatable."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="Leave out matching paths. `*` also matches `/`."),
    column_option,
    click.option(
        "--limit", type=int, default=None, help="Maximum number of images: the first listed, in no particular order."
    ),
    click.option("--shuffle-seed", type=int, default=None, help="Random order; with --limit, a random sample."),
    click.option("--retry-failed", is_flag=True, help="Process images again that failed before."),
    click.option("--rescore", is_flag=True, help="Process all images again."),
)
max_failed_option = click.option(
    "--max-failed",
    type=ShareType(),
    default="1%",
    show_default=True,
    help="Share of failed images above which the exit code is 3; results are written anyway.",
)
max_left_out_option = click.option(
    "--max-left-out",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Folders and containers of SOURCE that may be unreadable, in whole or in part; with more, the exit code is "
    "3. Files left out by name do not count.",
)


def limits_from(options: dict[str, Any]) -> DecodeLimits:
    """Take the limit options out of a command's keyword arguments."""
    names = ("max_bytes", "max_pixels", "max_seconds")
    return DecodeLimits(**{name: options.pop(name) for name in names})


def pin_option(multiple: bool = False) -> Callable[[Any], Any]:
    """`--detector-sha256`: the bundle that `--detector` must be."""
    again = " With several --detector: once for each, in the same order." if multiple else ""
    return click.option(
        "--detector-sha256", "pins" if multiple else "detector_sha256", type=DIGEST, multiple=multiple, metavar="HEX",
        help=f"SHA-256 that detector.json of the bundle must have; it covers every other file.{again}",
    )  # fmt: skip


class WorkersType(click.ParamType[tuple[int, int]]):
    """A number of workers as `4`, or a range as `2-8`."""

    name = "workers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        low, dash, high = str(value).partition("-")
        high = high if dash else low
        if not (low.isdecimal() and high.isdecimal()):
            self.fail(f"{value!r} is neither a number such as 4 nor a range such as 2-8", param, ctx)
        return int(low), int(high)


def leakage_option(default: int) -> Callable[[Any], Any]:
    """`--leakage`: images by which leakage is measured."""
    return click.option(
        "--leakage", type=click.IntRange(0, MAX_LEAKAGE_IMAGES), default=default, show_default=True, metavar="N",
        help="Measure by N images what a linear probe finds of their content; 0: do not.",
    )  # fmt: skip
