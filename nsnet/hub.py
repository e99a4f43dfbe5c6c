"""Finds weights by name in the hub's local cache or downloads them; the error states how to download them."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Final

from nsnet.errors import WeightsError

TIMEOUT_SECONDS: Final = 5.0
"""Timeout of a request to the hub, after which it counts as unreachable."""


def fetch(
    download: Callable[[bool], Path],
    repository: str,
    revision: str | None,
    *,
    probe: str,
    wanted: str,
    option: str,
    known: bool = True,
) -> Path:
    """Return the path from `download(local_files_only)`: from the cache, or if that raises `OSError`, from the hub.

    probe: a file of the repository, used to test the connection before a download. wanted: the file to download, "" for
    the whole repository. option: the command-line option that takes a local path instead. known: whether downloading
    from the hub is allowed. Raises `WeightsError`.
    """
    try:
        return download(True)
    except OSError:
        pass
    pin = ["--revision", revision] if revision else []
    command = shlex.join(["hf", "download", repository, *filter(None, [wanted]), *pin])
    if not known:
        raise WeightsError(
            f"{repository}{f' at {revision}' if revision else ''} is not in the local cache, and this release "
            f"downloads only models on its list; if you trust it, run: {command} and copy its cache here, or pass "
            f"{option}"
        )
    import huggingface_hub  # slow to import; needed only for weights by name

    try:
        # First one short request: without a network the download would retry for minutes.
        url = huggingface_hub.hf_hub_url(repository, probe, revision=revision)
        huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS)
        return download(False)
    except Exception as error:  # the exceptions depend on the HTTP library of the hub's client
        raise WeightsError(
            f"{f'{wanted} of ' if wanted else ''}{repository} is not in the local cache and cannot be downloaded from "
            f"the hub ({type(error).__name__}); on a machine with access run: {command} and copy its cache here, or "
            f"pass {option}"
        ) from error
