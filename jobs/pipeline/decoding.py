"""Decode images in a guarded child process: an image that crashes, hangs or floods its decoder fails alone.

first     {"anchors_bytes"}, a trust list, if there is one
request   {"size_bytes", "transform", "seed"}, the image's bytes
answer    header with facts, patches (K·N·N·3 bytes) of each mosaic, thumbnail (S·S·3 bytes); or only a header with
          an error
          then, if the file has content credentials, a header with its provenance

Credentials are answered after the pixels: a manifest that crashes or hangs their reader costs no verdict.
"""

import re
from dataclasses import asdict, replace
from typing import Any, BinaryIO, Final

import numpy as np

from jobs.isolation import frames
from jobs.isolation.guard import START_SECONDS, Child, ChildTimeoutError, Clock, Zygote, exit_reason
from nsnet import errors, preparation, provenance
from nsnet.config import from_dict, to_dict
from nsnet.errors import DecoderCrashError, ImageCorruptError, ImageError, ImageTimeoutError
from nsnet.preparation import PreparationConfig, Prepared, prepare, shapes
from nsnet.provenance import ALL_STATES, ERROR, GENERATORS, MAX_TEXT, SOURCE_TYPES, Provenance, with_credentials

ANSWER_KEYS: Final = ("width", "height", "format", "frames", "quality", "perceptual_hash", "remark", "size_bytes")
"""Keys of an answer's header."""
MAX_REMARK: Final = 200
CREDENTIALS_SECONDS: Final = 5.0
"""Limit of computing time for reading content credentials; a store of 50 MB takes a tenth of it."""
SERVICE: Final = "jobs.pipeline.decoding"

_zygote = Zygote(SERVICE)


class GuardedDecoder:
    """Prepares images in one guarded child process, which starts on first use and restarts after a crash or timeout."""

    def __init__(self, config: PreparationConfig, zygote: Zygote = _zygote) -> None:
        self.config = config
        self._zygote = zygote
        self._shapes = shapes(config)
        self._child: Child | None = None
        self.computed = 0.0
        """Seconds of computing that the last image took."""

    def prepare(self, image: bytes, transform: str = "", seed: int = 0, max_seconds: float | None = None) -> Prepared:
        """Like `preparation.prepare`; also raises `ImageTimeoutError` and `DecoderCrashError`.

        `max_seconds`: limit of computing time; None: the configured limit.
        """
        self.computed = 0.0
        if not image or len(image) > self.config.limits.max_bytes:
            return prepare(image, self.config)  # raises, and needs no child
        child = self._running()
        clock = Clock(child.pid, self.config.limits.max_seconds if max_seconds is None else max_seconds)
        try:
            child.send(clock, {"size_bytes": len(image), "transform": transform, "seed": seed}, image)
            prepared = self._answer(child, clock)
        except ImageError:  # the answer was complete
            raise
        except (EOFError, BrokenPipeError) as error:
            raise DecoderCrashError(f"the decoder ended with {exit_reason(self._end())} on this image") from error
        except ChildTimeoutError as error:
            self._end()
            raise ImageTimeoutError(f"decoding took longer than {error} (--max-seconds)") from error
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            self._end()
            raise DecoderCrashError(f"the decoder's answer is malformed ({type(error).__name__})") from error
        except BaseException:  # the rest of this answer must not be read as the next one
            self._end()
            raise
        finally:
            self.computed = clock.computed
        if prepared.provenance is None or prepared.provenance.c2pa_state is not None:
            return prepared
        return replace(prepared, provenance=self._credentials(child, prepared.provenance))

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._end()

    def _answer(self, child: Child, clock: Clock) -> Prepared:
        header = child.receive(clock)
        if "error_class" in header:
            error_class = getattr(errors, str(header["error_class"]), ImageCorruptError)
            is_known = isinstance(error_class, type) and issubclass(error_class, ImageError)
            raise (error_class if is_known else ImageCorruptError)(_text(header["error_message"]))
        *patches, thumbnail = pixels = [np.empty(shape, np.uint8) for shape in self._shapes]
        child.read_into([array.data for array in pixels], clock)
        return Prepared(
            patches=tuple(patches),
            thumbnail=thumbnail,
            width=_count(header["width"]),
            height=_count(header["height"]),
            format=_text(header["format"]),
            frames=_count(header["frames"]),
            quality=None if header["quality"] is None else _count(header["quality"]),
            perceptual_hash=_hash(header["perceptual_hash"]),
            remark=None if header["remark"] is None else _text(header["remark"])[:MAX_REMARK],
            provenance=_provenance(header["provenance"]) if self.config.provenance else None,
            size_bytes=None if header["size_bytes"] is None else _count(header["size_bytes"]),
        )

    def _credentials(self, child: Child, origin: Provenance) -> Provenance:
        """Receive the provenance with the credentials of the image that was just answered."""
        try:
            answer = _provenance(child.receive(Clock(child.pid, CREDENTIALS_SECONDS)))
            if answer.c2pa_state is not None:
                return answer
        except (EOFError, ChildTimeoutError, ValueError, KeyError, TypeError, RecursionError):
            self._end()
        except BaseException:
            self._end()
            raise
        return replace(origin, c2pa_state=ERROR)

    def _running(self) -> Child:
        if self._child is not None and not self._child.is_quiet():
            self._end()
        if self._child is None:
            settings = to_dict(replace(self.config, anchors=""))  # a trust list may be too long for this message
            child = self._child = self._zygote.fork(settings, self.config.limits.max_memory_bytes)
            if self.config.provenance and self.config.anchors:
                anchors = self.config.anchors.encode()
                child.send(Clock(child.pid, START_SECONDS), {"anchors_bytes": len(anchors)}, anchors)
        return self._child

    def _end(self) -> int:
        assert self._child is not None
        child, self._child = self._child, None
        return child.end()


def _text(value: Any) -> str:
    """The child's text without lone surrogates, which no table can hold."""
    return str(value).encode("utf-8", "replace").decode()


def _count(value: Any) -> int:
    number = int(value)
    if not 0 < number < 2**31:
        raise ValueError(f"{number} is not a number of pixels, frames or bytes")
    return number


def _provenance(answer: Any) -> Provenance:
    """The child's answer, checked: it may be an attacker's."""
    answer = answer if isinstance(answer, dict) else {}
    state, source_type, generator = (
        answer[name] for name in ("c2pa_state", "digital_source_type", "metadata_generator")
    )
    if (
        state not in (None, *ALL_STATES)
        or generator not in (None, *GENERATORS)
        or source_type not in (None, *SOURCE_TYPES)
    ):
        raise ValueError("not a provenance")
    signed = answer["c2pa_generator"]
    return Provenance(
        c2pa_state=state,
        c2pa_generator=None if signed is None else _text(signed)[:MAX_TEXT],
        digital_source_type=source_type,
        metadata_generator=generator,
    )


def _hash(value: Any) -> str | None:
    if value is not None and not re.fullmatch("[0-9a-f]{16}", str(value)):
        raise ValueError("not a perceptual hash")
    return value if value is None else str(value)


# The child's side.


def preload() -> None:
    """Load what decoding needs, before the child loses the right to open files."""
    preparation.preload(PreparationConfig(thumbnail_px=16, fingerprint=True))
    provenance.preload()


def serve(requests: BinaryIO, answers: BinaryIO, settings: dict[str, Any]) -> None:
    """Answer requests in the child until the input ends."""
    config, anchors = from_dict(PreparationConfig, settings), ""
    while (request := frames.receive(requests)) is not None:
        if "anchors_bytes" in request:
            anchors = requests.read(request["anchors_bytes"]).decode()
            continue
        image = requests.read(request["size_bytes"])
        try:
            prepared = prepare(image, config, request["transform"], request["seed"])
        except ImageError as error:
            frames.send(answers, {"error_class": type(error).__name__, "error_message": str(error)})
            continue
        header = {name: getattr(prepared, name) for name in ANSWER_KEYS}
        origin = prepared.provenance
        if origin is not None:
            header["provenance"] = asdict(origin)
        frames.send(answers, header, *(array.data for array in (*prepared.patches, prepared.thumbnail)))
        if origin is not None and origin.c2pa_state is None:
            frames.send(answers, asdict(with_credentials(origin, image, anchors)))
