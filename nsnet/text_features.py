"""Features of captions by the frozen text tower, each computed once.

Dimensions: B captions, D embedding.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from nsnet.clip import Clip

ENTRIES: Final = 16_384
"""Features that are remembered, at most 50 MB with 768 dimensions."""


class TextFeatures:
    """Features of captions, each encoded once, in groups of similar length (`Clip.text_lengths`).

    With a `batch_size`, every call of the tower has that number of captions, and features are remembered: captions of
    similar images repeat. A feature then does not depend, in its last bits, on the other captions. Without, nothing is
    remembered, for the same reason.
    """

    def __init__(self, clip: Clip, batch_size: int | None = None, entries: int = ENTRIES) -> None:
        self.clip, self.batch_size, self.entries = clip, batch_size, entries if batch_size else 0
        self._known: dict[str, Tensor] = {}

    def of(self, captions: Sequence[str]) -> Tensor:
        """Features of captions -> (B, D) fp32 on the tower's device, not normalised."""
        groups: dict[int, list[str]] = {}
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        for caption, length in zip(new, self.clip.text_lengths(new), strict=True):
            groups.setdefault(length, []).append(caption)
        for length, group in groups.items():
            size = self.batch_size or len(group)
            for start in range(0, len(group), size):
                batch = group[start : start + size]
                features = self.clip.encode_text(batch + batch[:1] * (size - len(batch)), length)
                self._known.update(zip(batch, features.unbind(), strict=False))
        result = torch.stack([self._known[caption] for caption in captions])
        while len(self._known) > self.entries:  # the oldest
            del self._known[next(iter(self._known))]
        return result
