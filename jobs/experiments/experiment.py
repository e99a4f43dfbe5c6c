"""A resolved training: the request and the recipe, models and settings that follow from it. Every step receives it."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

from jobs.experiments.request import TrainRequest, needs_captions
from jobs.pipeline.models import Models
from jobs.runs import products
from jobs.runs.products import Product
from jobs.storage import uris
from jobs.storage.uris import Uri
from jobs.workflows.caption import features_id
from jobs.workflows.examine import FACTS_ID
from nsnet.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Location of the images' published facts, or of captions if they are needed."""

    place: Uri
    product: Product
    maker: str
    """Id of the captioner and the text tower, or version of the facts."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training: its request, recipe, models, settings, and file locations."""

    request: TrainRequest
    recipe: Recipe
    """The recipe with the request's changes and, after fitting, the rank or bank size of its projection."""
    models: Models
    """Local weights that replace the hub's."""
    settings: dict[str, Any]
    """Identity of the training: `TrainRequest.identity` before fitting."""

    @classmethod
    def resolve(cls, request: TrainRequest) -> Self:
        """The experiment of a request. Raises `ConfigError`."""
        recipe = request.resolved()
        return cls(
            request=request,
            recipe=recipe,
            models=Models(
                clip_weights=request.clip_weights,
                text_weights=request.text_weights,
                captioner=request.captioner,
                weights=request.weights,
            ),
            settings=request.identity(recipe),
        )

    @property
    def needs_captions(self) -> bool:
        """Whether training reads captions."""
        return needs_captions(self.recipe)

    def with_recipe(self, recipe: Recipe) -> Self:
        """The experiment with its projection fitted, which changes nothing in its facts."""
        fitted = replace(self, recipe=recipe)
        fitted.__dict__["facts"] = self.facts  # computing their id again would read all weights again
        return fitted

    @cached_property
    def facts(self) -> Facts:
        """Location of the facts of the source's images, published by `nsnet caption` or in the training's folder.

        Takes about 1 s per GB of weights, because the id contains their digests. Raises `WeightsError`.
        """
        if not self.needs_captions and self.request.captions is None:
            return Facts(place=self.file("facts"), product=products.FACTS, maker=FACTS_ID)

        place = self.request.captions or self.file("captions")
        return Facts(place=place, product=products.CAPTIONS, maker=features_id(self.recipe.detector, self.models))

    def file(self, name: str) -> Uri:
        """URI of a file or folder (`paths`) in the training's folder."""
        return uris.join(self.request.work, name)
