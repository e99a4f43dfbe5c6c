"""Identity of weights: equal weights have one digest, whatever file they came from."""

import hashlib
from collections.abc import Mapping

from torch import Tensor


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hexadecimal) over names, shapes and values, as fp32, of a model's state; about 1 s per GB."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(f"{name} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return sha.hexdigest()
