"""Aligns files: encodes images alike, so that format, quality and size do not tell real from fake.

In many sets the reals are JPEG files and the fakes are PNG files. A detector that has learned to tell these apart
seems to find fakes. An alignment is a chain of `nsnet.transforms` that ends in a file, such as `jpeg:96` or
`centre:256+jpeg:96`, or `lossless:jpeg:96` for lossless files alone. Traces of an earlier compression that is stronger
stay in the pixels: an alignment makes files alike, not their histories.
"""

from collections.abc import Sequence

from nsnet import images, transforms
from nsnet.errors import ConfigError
from nsnet.images import DecodedImage
from nsnet.limits import DecodeLimits
from nsnet.transforms import ENCODERS, LOSSLESS, Transform


def parse(text: str) -> tuple[Transform, ...]:
    """Parse an alignment. Raises `ConfigError` for a chain that would leave some images without a file."""
    try:
        chain = transforms.parse(text)
    except ConfigError as error:
        raise ConfigError(f"--align {text}: {error}") from error
    if not chain or chain[-1].name not in ENCODERS:
        raise ConfigError(
            f"--align {text!r} does not end in a file: end it with {' or '.join(ENCODERS)}, as in centre:256+jpeg:96"
        )
    if chain[-1].lossless_only and not all(step.lossless_only for step in chain):
        raise ConfigError(
            f"--align {text} changes lossy files and does not encode them: write {LOSSLESS} before each step, or not "
            "before the last one"
        )
    return chain


def stored(
    image: DecodedImage, chain: Sequence[Transform], *, seed: int, limits: DecodeLimits
) -> tuple[DecodedImage, int]:
    """The image as it is read from the file that a chain makes of it, and the bytes of that file.

    Raises an `ImageError`, as `transforms.to_file` and `images.decode_image` do.
    """
    file = transforms.to_file(image.pixels, chain, seed=seed, max_pixels=limits.max_pixels)
    return images.decode_image(file, limits), len(file)
