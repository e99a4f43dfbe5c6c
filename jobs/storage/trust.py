"""Read trust lists of content credentials."""

from typing import Final

from jobs.storage import errors, listing, reading
from jobs.storage.uris import Uri
from nsnet.errors import ConfigError, StorageError
from nsnet.provenance import check_anchors

MAX_BYTES: Final = 4 * 2**20


def read_trust_list(uri: Uri | None) -> str:
    """Certificates of a trust list, in PEM; empty if none is given. Raises `ConfigError` or `StorageError`."""
    if uri is None:
        return ""
    try:
        size = listing.describe(uri).size_bytes
        if size > MAX_BYTES:
            raise ConfigError(f"the trust list {uri} has {size:,} bytes, the limit is {MAX_BYTES:,}")
        anchors = reading.read_bytes(uri).decode()
    except FileNotFoundError as error:
        raise ConfigError(f"there is no trust list {uri}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the trust list {uri} is not text: it must hold certificates in PEM") from error
    except OSError as error:
        raise StorageError(f"the trust list {uri} cannot be read: {errors.reason(error)}") from error
    check_anchors(anchors, f"the trust list {uri}")
    return anchors
