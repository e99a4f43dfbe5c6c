"""Arrow schemas of what is planned, exchanged and published."""

from typing import Final

import pyarrow as pa

MANIFEST: Final = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),  # hash of URI and version
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("modified_at", pa.timestamp("us", tz="UTC")),  # the store's time of the last change
        pa.field("container", pa.string()),  # file that holds the image, where it is not the URI itself
        pa.field("position", pa.int64()),  # byte offset in a tar, row in a Parquet file
        pa.field("column", pa.string()),  # of a Parquet file that holds images
        pa.field("listed", pa.bool_(), nullable=False),  # the etag is the store's own: what is fetched must have it
        pa.field("label", pa.int8()),  # 0 real, 1 fake
        pa.field("generator", pa.string()),
        pa.field("split", pa.string()),
        pa.field("expected_hash", pa.string()),  # SHA-256 that the file must have, where a manifest says so
        pa.field("problem", pa.string()),  # why the row names no image that can be read; null: it does
        pa.field("transform", pa.string()),  # chain of `nsnet.transforms` to apply before judging; null: none
    ]
)
"""What is planned: one row per image."""

IDS: Final = pa.schema([MANIFEST.field("image_id")])

KNOWN_CAPTION: Final = [
    pa.field("known_caption", pa.string()),
    pa.field("known_hash", pa.string()),  # SHA-256 of the file that was captioned
    pa.field("known_run_id", pa.string()),  # run that captioned it
]

TODO: Final = pa.schema([*MANIFEST, *KNOWN_CAPTION])
"""What an attempt has to do: rows of the manifest, each with a caption that was published for what may be the same
content; it holds if the content's hash says so."""

OUTCOME: Final = [
    pa.field("status", pa.string(), nullable=False),  # scored, failed
    pa.field("error_stage", pa.string()),  # fetch, decode, caption, score
    pa.field("error_class", pa.string()),
    pa.field("error_message", pa.string()),
]

IMAGE: Final = [
    pa.field("width", pa.int32()),  # pixels, after the EXIF orientation
    pa.field("height", pa.int32()),
    pa.field("format", pa.string()),
    pa.field("frames", pa.int32()),  # of which the first is judged
    pa.field("remark", pa.string()),  # what is wrong with a file that could be judged all the same
    pa.field("content_hash", pa.string()),  # SHA-256 of the file
    pa.field("requests", pa.int32()),  # of its bytes (in Parquet: tries); more than 1: the store was asked again
]

CAPTION: Final = [
    pa.field("caption", pa.string()),
    pa.field("caption_id", pa.string()),  # captioner and content: equal ids, equal captions
    pa.field("caption_run_id", pa.string()),  # run that asked the captioner; another one where it was reused
]

FINGERPRINT: Final = [
    pa.field("jpeg_quality", pa.int32()),  # 1 to 100, estimated from the file's tables; null: no JPEG
    pa.field("perceptual_hash", pa.string()),  # 64 bits, hexadecimal; null: too plain an image
]

SOURCE: Final = [MANIFEST.field(name) for name in ("image_id", "uri", "etag", "size_bytes")]
LABELS: Final = [MANIFEST.field(name) for name in ("label", "generator")]
SPLIT_COLUMN: Final = MANIFEST.field("split")
TRANSFORM: Final = MANIFEST.field("transform")

VERDICTS: Final = pa.schema(
    [
        *SOURCE,
        *IMAGE,
        *CAPTION,
        pa.field("logit", pa.float64()),
        pa.field("prob_fake", pa.float64()),
        pa.field("verdict", pa.string()),  # real, fake, uncertain; null for a failed row
        pa.field("threshold", pa.float64()),
        pa.field("residual_energy", pa.float64()),
        *OUTCOME,
        pa.field("detector_id", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("scored_at", pa.timestamp("us", tz="UTC"), nullable=False),
        *LABELS,
        TRANSFORM,  # what was done to the image before it was judged; null: nothing
    ]
)
"""Published verdicts: one row per planned image."""

DONE: Final = pa.schema([VERDICTS.field(name) for name in ("image_id", "uri", "status", "error_class")])
"""What a plan asks of published verdicts."""

CAPTIONED: Final = pa.schema(
    [
        VERDICTS.field(name)
        for name in (
            "image_id", "uri", "size_bytes", "caption", "content_hash", "caption_id", "caption_run_id", "transform"
        )
    ]
)  # fmt: skip
"""What can be known of captions from published rows."""

FACTS: Final = pa.schema([*SOURCE, *IMAGE, *FINGERPRINT, *OUTCOME, *LABELS, SPLIT_COLUMN])
"""What is known of an image without any model."""

TEXT_FEATURES: Final = pa.field("text_features", pa.list_(pa.float32()))
"""The frozen text tower's features (D) of a caption."""

CAPTIONS: Final = pa.schema([*FACTS, *CAPTION, TRANSFORM, TEXT_FEATURES])
"""What `nsnet caption` publishes, and training reads."""


def stored(columns: pa.Schema) -> pa.Schema:
    """The types of published columns in their files.

    Their folder is named by the run as well. pandas reads such names as dictionaries, and refuses a column of that name
    with another type.
    """
    at = columns.get_field_index("run_id")
    if at < 0:
        return columns
    return columns.set(at, columns.field(at).with_type(pa.dictionary(pa.int32(), pa.string())))


PREDICTIONS: Final = pa.schema(
    [
        *(VERDICTS.field(name) for name in ("image_id", "uri")),
        *LABELS,
        SPLIT_COLUMN,
        *(VERDICTS.field(name) for name in ("logit", "prob_fake", "verdict", "threshold", "status")),
        pa.field("detector_id", pa.string()),
    ]
)
"""Predictions as they are stored: verdicts that `nsnet evaluate` reads."""


SPLIT: Final = pa.schema(
    [
        *MANIFEST,
        pa.field("content_hash", pa.string()),
        pa.field("group", pa.int64()),  # number of the near-duplicate group, which lies in one split
    ]
)
"""A split as it is stored: a manifest with each image's content and near-duplicate group."""
