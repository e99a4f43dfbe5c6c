"""Facts of a source's images, without any model: sizes, formats, JPEG quality, content and perceptual hashes."""

from typing import TYPE_CHECKING, Any, Final

from jobs.cluster.address import check_address
from jobs.dataset import schema
from jobs.dataset.plan import Selection
from jobs.dataset.source import Source
from jobs.runs import failures, products
from jobs.runs.attempts import Attempt
from jobs.runs.execution import Request, Work, carry_out
from jobs.runs.publication import Run
from jobs.storage import probes
from jobs.storage.uris import Uri
from nsnet.config import to_dict
from nsnet.images import DecodeLimits

if TYPE_CHECKING:  # Ray takes seconds to import, and a run with nothing to do needs none
    from jobs.pipeline.stream import Stream

FACTS_ID: Final = "facts-1"
"""Version of what is found out: facts of another one are found out anew."""


def examine(
    source: Uri,
    *,
    out: Uri,
    selection: Selection | None = None,
    wait: bool = False,
    limits: DecodeLimits | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Publish the facts (`schema.FACTS`) of the images that have none in `out` yet; returns the run's record."""
    limits = limits or DecodeLimits()
    probes.check_output(out)
    check_address(address)
    Source(source).check()

    def work(run: Run) -> Work:
        from jobs.pipeline.models import Models
        from jobs.pipeline.stream import prepared
        from nsnet.preparation import PreparationConfig

        def stream(attempt: Attempt) -> "Stream":
            return prepared(
                attempt.todo, source, PreparationConfig(patches=None, fingerprint=True, limits=limits), Models(),
                keep=schema.FACTS, batch_size=1, checkpoint=attempt.checkpoint, remembered=failures.remembered(request),
            )  # fmt: skip

        return Work(title="examine", stages=("prepared",), stream=stream)

    request = Request(
        source=source, out=out, product=products.FACTS, maker=FACTS_ID,
        selection=selection or Selection(), wait=wait, address=address, settings={"limits": to_dict(limits)},
    )  # fmt: skip
    return carry_out(request, work)
