"""Arrow schemas of manifests, of rows between stages, and of published tables."""

from typing import Final

import pyarrow as pa

MANIFEST: Final = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),  # hash of URI and version
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("modified_at", pa.timestamp("us", tz="UTC")),  # the store's time of the last change
        pa.field("container", pa.string()),  # file that contains the image; null: the URI itself
        pa.field("position", pa.int64()),  # byte offset in a tar, row in a Parquet file
        pa.field("column", pa.string()),  # image column of a Parquet file
        pa.field("listed", pa.bool_(), nullable=False),  # the etag is the store's: the fetched object must have it
        pa.field("label", pa.int8()),  # 0 real, 1 fake
        pa.field("generator", pa.string()),
        pa.field("split", pa.string()),
        pa.field("expected_hash", pa.string()),  # SHA-256 that the file must have; null: any
        pa.field("problem", pa.string()),  # why the row names no readable image; null: it names one
        pa.field("transform", pa.string()),  # chain of `nsnet.transforms` to apply before judging; null: none
    ]
)
"""Planned images, one row per image and transform."""

IDS: Final = pa.schema([MANIFEST.field("image_id")])

KNOWN_CAPTION: Final = [
    pa.field("known_caption", pa.string()),
    pa.field("known_hash", pa.string()),  # SHA-256 of the file that was captioned
    pa.field("known_run_id", pa.string()),  # run that captioned it
]

WANTED: Final = pa.field("wanted", pa.int64())
"""Bit i: the i-th run of the attempt wants a row of this image."""
TODO: Final = pa.schema([*MANIFEST, *KNOWN_CAPTION, WANTED])
"""Rows that an attempt must process: manifest rows, each with a published caption of possibly the same content. The
caption is used if the content's hash equals `known_hash`."""

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
    pa.field("frames", pa.int32()),  # the first one is judged
    pa.field("remark", pa.string()),  # defect of a file that could still be judged
    pa.field("content_hash", pa.string()),  # SHA-256 of the file
    pa.field("requests", pa.int32()),  # for its bytes (in Parquet: attempts); more than 1: retries
]

PROVENANCE: Final = [
    pa.field("c2pa_state", pa.string()),  # content credentials: none, valid, untrusted, invalid, error
    pa.field("c2pa_generator", pa.string()),  # software that the signed manifest names
    pa.field("digital_source_type", pa.string()),  # IPTC's term, of the signed manifest, else of XMP
    pa.field("metadata_generator", pa.string()),  # generator that wrote PNG texts, EXIF or XMP
]
"""What the file says about its origin; null in failed rows and in those of releases before these columns."""

CAPTION: Final = [
    pa.field("caption", pa.string()),
    pa.field("caption_id", pa.string()),  # captioner and content: equal ids, equal captions
    pa.field("caption_run_id", pa.string()),  # run that computed it; another run if it was reused
]

FINGERPRINT: Final = [
    pa.field("jpeg_quality", pa.int32()),  # 1 to 100, estimated from the file's tables; null: not a JPEG
    pa.field("perceptual_hash", pa.string()),  # 64 bits, hexadecimal; null: the image has too little detail
]

SOURCE: Final = [MANIFEST.field(name) for name in ("image_id", "uri", "etag", "size_bytes")]
LABELS: Final = [MANIFEST.field(name) for name in ("label", "generator")]
SPLIT_COLUMN: Final = MANIFEST.field("split")
TRANSFORM: Final = MANIFEST.field("transform")

VERDICTS: Final = pa.schema(
    [
        *SOURCE,
        *IMAGE,
        *PROVENANCE,
        *CAPTION,
        pa.field("logit", pa.float64()),
        pa.field("prob_fake", pa.float64()),
        pa.field("verdict", pa.string()),  # real, fake, uncertain; null for a failed row
        pa.field("threshold", pa.float64()),
        pa.field("residual_energy", pa.float64()),
        pa.field("prob_spread", pa.float64()),  # largest minus smallest prob_fake of the views; null: one view
        pa.field("views_agree", pa.bool_()),  # whether all views lie on the same side of the threshold
        *OUTCOME,
        pa.field("detector_id", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("scored_at", pa.timestamp("us", tz="UTC"), nullable=False),
        *LABELS,
        TRANSFORM,  # applied to the image before it was judged; null: none
    ]
)
"""Published verdicts: one row per planned image."""

LATER: Final = ("remark", "transform", *(field.name for field in PROVENANCE), "prob_spread", "views_agree")
"""Columns that staged rows of older releases lack."""

DONE: Final = pa.schema([VERDICTS.field(name) for name in ("image_id", "uri", "status", "error_class")])
"""Columns of published verdicts that a plan reads."""

CAPTIONED: Final = pa.schema(
    [
        VERDICTS.field(name)
        for name in (
            "image_id", "uri", "size_bytes", "caption", "content_hash", "caption_id", "caption_run_id", "transform"
        )
    ]
)  # fmt: skip
"""Columns of published rows that are needed to reuse captions."""

_FACTS: Final = [*SOURCE, *IMAGE, *FINGERPRINT, *OUTCOME, *LABELS, SPLIT_COLUMN]
FACTS: Final = pa.schema([*_FACTS, TRANSFORM])
"""Facts about an image that need no model; under a transform, those of the file that an alignment would make of it."""

TEXT_FEATURES: Final = pa.field("text_features", pa.list_(pa.float32()))
"""The frozen text tower's features (D) of a caption."""

CAPTIONS: Final = pa.schema([*_FACTS, *CAPTION, TRANSFORM, TEXT_FEATURES])
"""Published by `nsnet caption`, read by training."""


def stored(columns: pa.Schema) -> pa.Schema:
    """The column types of published files.

    Their folder is a partition by run too. pandas reads a partition as a dictionary and rejects a column of the same
    name with another type, so `run_id` is stored as a dictionary.
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
"""Stored predictions: verdicts that `nsnet evaluate` reads."""


SPLIT: Final = pa.schema(
    [
        *MANIFEST,
        pa.field("content_hash", pa.string()),
        pa.field("group", pa.int64()),  # near-duplicate group; all of a group is in one split
    ]
)
"""A stored split: a manifest with each image's content hash and near-duplicate group."""
