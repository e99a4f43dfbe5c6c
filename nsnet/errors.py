"""The exceptions a caller may meet.

NsnetError
├── UsageError              the request cannot be carried out as asked (exit code 2)
│   ├── ConfigError         a setting is out of its range, or settings contradict each other
│   ├── SourceError         no source, an empty source, a source without the labels that are needed
│   ├── WeightsError        pretrained weights are missing, or do not fit the architecture
│   ├── BundleError         a detector bundle is missing, damaged or of another version
│   └── NullSpaceError      the requested semantic basis leaves no null space
├── StorageError            a bucket or path cannot be reached (exit code 1)
│   └── OutageError         the store of the images stopped answering; the run can be continued
├── LockedError             another run holds the lock of an output (exit code 4)
└── ImageError              one image failed; jobs turn it into a failed row
    ├── ImageEmptyError         no bytes
    ├── ImageTooLargeError      over the limit of bytes or pixels
    ├── ImageUnidentifiedError  no supported image format
    ├── ImageCorruptError       the format is known, the data is damaged
    ├── ImageTimeoutError       over the limit of seconds
    ├── ImageBudgetError        slow, and the run has no time left for slow images
    ├── DecoderCrashError       the decoder's process died
    ├── FetchError              the bytes could not be read from storage
    │   ├── ObjectMissingError      gone since it was listed
    │   ├── ObjectChangedError      replaced since it was listed
    │   └── ObjectDeniedError       the store does not allow reading it
    ├── CaptionError            the captioner gave no caption
    └── ScoreError              the network gave no finite number
"""


class NsnetError(Exception):
    """Base of everything raised on purpose. The message is one line that a person can act on."""

    exit_code = 1


class UsageError(NsnetError):
    """The request cannot be carried out as asked."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting is out of its range, or settings contradict each other."""


class SourceError(UsageError):
    """No source, an empty source, or a source without the labels that are needed."""


class WeightsError(UsageError):
    """Pretrained weights are missing or do not fit the architecture."""


class BundleError(UsageError):
    """A detector bundle is missing, damaged or of another version."""


class NullSpaceError(UsageError):
    """The requested semantic basis leaves no null space."""


class StorageError(NsnetError):
    """A bucket or path cannot be reached."""


class OutageError(StorageError):
    """The store of the images stopped answering while a run read from it."""


class LockedError(NsnetError):
    """Another run holds the lock of an output."""

    exit_code = 4


class ImageError(NsnetError):
    """One image failed. In a job this is a row, not an exception."""

    stage = "decode"
    """Stage in which it failed: fetch, decode, caption or score."""
    requests = 0
    """How often the store was asked for it."""


class ImageEmptyError(ImageError):
    """The object holds no bytes."""


class ImageTooLargeError(ImageError):
    """Over the limit of bytes or pixels."""


class ImageUnidentifiedError(ImageError):
    """The bytes are no supported image format."""


class ImageCorruptError(ImageError):
    """The format is known, the data is damaged."""


class ImageTimeoutError(ImageError):
    """Decoding took longer than allowed."""


class ImageBudgetError(ImageError):
    """Decoding is slow, and the run has spent what it may on slow images."""


class DecoderCrashError(ImageError):
    """The process that decoded this image died."""


class FetchError(ImageError):
    """The bytes could not be read from storage."""

    stage = "fetch"
    requests = 1
    may_be_outage = False
    """Whether the store may be to blame, rather than this object."""


class ObjectMissingError(FetchError):
    """The object is gone since it was listed."""


class ObjectChangedError(FetchError):
    """The object was replaced since it was listed; the next run lists the new one."""


class ObjectDeniedError(FetchError):
    """The store does not allow reading this object."""


class CaptionError(ImageError):
    """The captioner gave no caption."""

    stage = "caption"


class ScoreError(ImageError):
    """The network gave no finite number."""

    stage = "score"
