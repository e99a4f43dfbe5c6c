"""A training, resolved: what was asked for, and what that comes to. Made once, and given to every part of the way."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from jobs.experiments.request import TrainRequest, needs_captions
from jobs.pipeline.models import Models
from jobs.runs import products
from jobs.runs.products import Product
from jobs.storage import uris
from jobs.storage.uris import Uri

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from nsnet.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Where facts of the images, and captions if they are needed, are published."""

    place: Uri
    product: Product
    maker: str
    """Id of the captioner and the text tower, or of the version of the facts."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training: its request, recipe, models, settings, and the places of its files."""

    request: TrainRequest
    recipe: "Recipe"
    """With everything that was asked for; once it is fitted, with the rank or the bank of its projection."""
    models: Models
    """The weights that were given, instead of the hub's."""
    settings: dict[str, Any]
    """What makes it the same training: `TrainRequest.identity`, before anything was fitted."""

    @classmethod
    def resolve(cls, request: TrainRequest) -> Self:
        """The experiment of a request. Raises `ConfigError`."""
        recipe = request.resolved()
        return cls(
            request=request,
            recipe=recipe,
            models=Models(clip_weights=request.clip_weights, captioner=request.captioner),
            settings=request.identity(recipe),
        )

    @property
    def needs_captions(self) -> bool:
        """As the function of that name says of its recipe."""
        return needs_captions(self.recipe)

    @cached_property
    def facts(self) -> Facts:
        """The facts of the source's images, published by `nsnet caption` or at the training's own place.

        About 1 s per GB of weights, whose digests are in the id. Raises `WeightsError`.
        """
        if not self.needs_captions and self.request.captions is None:
            from jobs.workflows.examine import FACTS_ID

            return Facts(place=self.file("facts"), product=products.FACTS, maker=FACTS_ID)
        from jobs.workflows.caption import features_id

        place = self.request.captions or self.file("captions")
        return Facts(place=place, product=products.CAPTIONS, maker=features_id(self.recipe.detector, self.models))

    def file(self, name: str) -> Uri:
        """A file or folder (`paths`) at the training's own place."""
        return uris.join(self.request.work, name)
