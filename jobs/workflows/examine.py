"""Publish facts of a source's images without a model: sizes, formats, JPEG quality, content and perceptual hashes."""

from typing import Any, Final

from jobs.cluster.address import check_address
from jobs.dataset.plan import Selection
from jobs.dataset.source import Source
from jobs.runs import products
from jobs.runs.execution import Request, Work, carry_out
from jobs.runs.publication import Run
from jobs.storage import probes
from jobs.storage.uris import Uri
from nsnet.config import to_dict
from nsnet.images import DecodeLimits

FACTS_ID: Final = "facts-1"
"""Version of the facts: a change makes all images be examined again."""


def examine(
    source: Uri,
    *,
    out: Uri,
    selection: Selection | None = None,
    align: str = "",
    wait: bool = False,
    limits: DecodeLimits | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Publish the facts (`schema.FACTS`) of the images that have none in `out` yet; returns the run's record.

    `align`: a chain of `nsnet.alignment`, "" for none; each image then has a row more, on the file that it makes.
    """
    limits = limits or DecodeLimits()
    probes.check_output(out)
    check_address(address)
    Source(source).check()

    request = Request(
        source=source, out=out, product=products.FACTS, maker=FACTS_ID,
        selection=selection or Selection(), transforms=("", align) if align else (), wait=wait, address=address,
        settings={"limits": to_dict(limits)},
    )  # fmt: skip

    def work(_: Run) -> Work:
        from jobs.workflows.streams import examining  # it imports Ray, which takes seconds

        return examining(request, limits=limits)

    return carry_out(request, work)
