"""Assigns rows to splits: each group of near-duplicates is in one split, and each stratum is divided by the shares.

Dimensions: n rows (images), g groups as numbered by `duplicates.near_duplicate_groups`, k splits with a share. A
stratum is a set of rows to divide evenly, such as a (generator, label) pair.

The published code draws training and test images independently from one folder, so they overlap. Here the splits are a
pure function of the set of rows and the seed; the order of the listing does not matter.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import fsum
from typing import Final

import numpy as np
import numpy.typing as npt

from nsnet.errors import ConfigError

Indices = npt.NDArray[np.int64]
Marks = npt.NDArray[np.bool_]

SPLITS: Final = ("train", "val", "test")

NAMED: Final = 20
"""Maximum number of generators that a message names."""


@dataclass(kw_only=True, slots=True)
class _Stock:
    """The state of one stratum during the assignment."""

    needs: dict[str, float]
    """Split -> rows that it still needs; negative if it has more than its share."""
    groups: int
    """Groups with a row in this stratum that have no split yet."""
    empty: set[str]
    """Splits that have no row of this stratum yet."""


def assign(
    groups: Indices, strata: Sequence[Hashable], keys: Sequence[str], *, shares: Mapping[str, float], seed: int
) -> list[str]:
    """Return the split of each of n rows, one of `SPLITS`; the rows of a group are in the same split.

    `keys`: content hashes; rows with equal keys must be in one group (`ValueError`). `shares`: split -> share of the
    rows of each stratum; they must sum to 1 (`ConfigError`). A split that is missing or has share 0 stays empty.

    Assigns groups over several strata first, then large groups before small ones; a seeded hash of the smallest key
    decides the order of ties. Each group goes to the split that needs it most. Copies are therefore mostly in the
    largest split, and the single images, which come last, balance the splits. Guarantees for a stratum:

    - if at least k groups have all their rows in it, every split has a row of it;
    - if all its groups do, and each share of it is at least its largest group, of m rows, then every split is within
      m (k − 1) / k rows of its share: within 1 row if no image has a near-duplicate.
    """
    names = _with_share(shares)
    if not len(groups) == len(strata) == len(keys):
        raise ValueError(f"{len(groups)} groups, {len(strata)} strata and {len(keys)} keys")
    if not len(groups):
        return []
    number_of: dict[Hashable, int] = {}
    places = np.array([number_of.setdefault(stratum, len(number_of)) for stratum in strata])
    members = np.unique(groups, return_inverse=True)[1]
    # A cell is a group's part in a stratum; the cells of a group are consecutive.
    cells, cell_rows = np.unique(members * len(number_of) + places, return_counts=True)
    spans = np.bincount(cells // len(number_of))
    cell_strata = cells % len(number_of)
    stocks = [
        _Stock(needs={name: shares[name] * size for name in names}, groups=group_count, empty=set(names))
        for size, group_count in zip(np.bincount(places).tolist(), np.bincount(cell_strata).tolist(), strict=True)
    ]
    stratum_of, rows_of, ends = cell_strata.tolist(), cell_rows.tolist(), np.cumsum(spans).tolist()
    digests = _digests(_smallest_keys(members.tolist(), keys, len(spans)), seed)
    chosen = [""] * len(spans)
    for group in np.lexsort((digests[:, 1], digests[:, 0], -np.bincount(members), spans == 1)).tolist():
        parts = [(stocks[stratum_of[at]], rows_of[at]) for at in range(ends[group] - int(spans[group]), ends[group])]
        chosen[group] = split = _choose(parts, names)
        for stock, rows in parts:
            stock.needs[split] -= rows
            stock.groups -= 1
            stock.empty.discard(split)
    return [chosen[member] for member in members.tolist()]


def leave_out(groups: Indices, generators: Sequence[str | None], left_out: str) -> tuple[Marks, Marks]:
    """(held_out, excluded), each (n,) bool: rows of the generator, and other rows in a group with one of these.

    A detector that is tested on an unseen generator must not be trained on either. Raises `ConfigError` if no row is
    of the generator.
    """
    if len(groups) != len(generators):
        raise ValueError(f"{len(groups)} groups and {len(generators)} generators")
    held_out = np.array([generator == left_out for generator in generators], dtype=np.bool_)
    if not held_out.any():
        known = sorted({generator for generator in generators if generator is not None})
        more = f" and {len(known) - NAMED} more" if len(known) > NAMED else ""
        raise ConfigError(
            f"cannot leave out the generator {left_out!r}: it has no image; choose one of the generators: "
            f"{', '.join(known[:NAMED]) or 'none'}{more}"
        )
    return held_out, np.isin(groups, groups[held_out]) & ~held_out


def _with_share(shares: Mapping[str, float]) -> list[str]:
    """Check the shares and return the splits that get rows."""
    unknown = sorted(set(shares) - set(SPLITS))
    if unknown:
        raise ConfigError(f"splits are {', '.join(SPLITS)}, got a share of {', '.join(unknown)}")
    # `not (… <= …)` also refuses NaN
    if any(not share >= 0.0 for share in shares.values()) or not abs(fsum(shares.values()) - 1.0) <= 1e-9:
        listed = ", ".join(f"{name} {share:g}" for name, share in shares.items()) or "none"
        raise ConfigError(f"the shares of the splits must be 0 or more and sum to 1, got {listed}")
    return [name for name in SPLITS if shares.get(name, 0.0) > 0.0]


def _choose(parts: Sequence[tuple[_Stock, int]], names: Sequence[str]) -> str:
    """Choose the split of a group from its strata and its number of rows in each.

    If a stratum has no more unassigned groups than splits without a row of it, such a split is preferred. Otherwise
    chooses the split with the largest Σ rows · need, which minimises Σ need² over strata and splits. Ties: by names.
    """

    def priority(name: str) -> tuple[int, float]:
        missing = sum(name in stock.empty for stock, _ in parts if stock.groups <= len(stock.empty))
        # an exact sum does not depend on the order of strata
        return missing, fsum(rows * stock.needs[name] for stock, rows in parts)

    return max(names, key=priority)


def _smallest_keys(members: Sequence[int], keys: Sequence[str], count: int) -> list[str]:
    """Return the smallest key of each group."""
    group_of: dict[str, int] = {}
    smallest: list[str | None] = [None] * count
    for member, key in zip(members, keys, strict=True):
        if group_of.setdefault(key, member) != member:
            raise ValueError(f"rows of the key {key!r} are in two groups: one image would be in two splits")
        known = smallest[member]
        if known is None or key < known:
            smallest[member] = key
    return [key for key in smallest if key is not None]


def _digests(keys: Sequence[str], seed: int) -> npt.NDArray[np.uint64]:
    """(g, 2) uint64: 128 bits per key, which give a random order that depends on the seed."""
    hashes = b"".join(blake2b(f"{seed} {key}".encode(), digest_size=16).digest() for key in keys)
    return np.frombuffer(hashes, ">u8").reshape(-1, 2).astype(np.uint64)
