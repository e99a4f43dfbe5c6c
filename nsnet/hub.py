"""Weights by name: from the hub's local cache, else from the hub, else an error that says how to fetch them."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Final

from nsnet.errors import WeightsError

TIMEOUT_SECONDS: Final = 5.0
"""How long the hub may take to answer before it counts as out of reach."""


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
    """What `download(local_files_only)` gives: first asked of the cache, where an `OSError` means that it is not there.

    probe: a file of the repository, asked about before anything is downloaded. wanted: the file to be fetched, "" for
    the whole repository. option: what takes a local path instead. known: whether it may be asked of the hub at all.
    Raises `WeightsError`.
    """
    try:
        return download(True)
    except OSError:
        pass
    pin = ["--revision", revision] if revision else []
    command = shlex.join(["hf", "download", repository, *filter(None, [wanted]), *pin])
    if not known:
        raise WeightsError(
            f"{repository}{f' at {revision}' if revision else ''} is not in the local cache, and this release fetches "
            f"only models that it knows; if you trust it, run: {command} and copy its cache here, or pass {option}"
        )
    import huggingface_hub  # slow to import, and needed only for weights by name

    try:
        # One short question first: without network the download would try again and again for minutes.
        url = huggingface_hub.hf_hub_url(repository, probe, revision=revision)
        huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS)
        return download(False)
    except Exception as error:  # those of whichever HTTP library the hub's client is built on
        raise WeightsError(
            f"{f'{wanted} of ' if wanted else ''}{repository} is not in the local cache and cannot be had from the hub "
            f"({type(error).__name__}); on a machine with access run: {command} and copy its cache here, or pass "
            f"{option}"
        ) from error
