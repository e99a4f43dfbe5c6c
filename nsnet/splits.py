"""Rows to splits: no group of near-duplicates lies in two, and each stratum is shared out as asked.

Dimensions: n rows (images), g groups as `duplicates.near_duplicate_groups` numbers them, k splits with a share. A
stratum is what is to be shared out evenly, such as a (generator, label) pair.

The published code draws training and test images independently from one folder, so that they overlap. Here the splits
are a pure function of the set of rows and the seed: a bucket that is listed in another order is split the same.
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
"""Generators that a message names at most."""


@dataclass(kw_only=True, slots=True)
class _Stock:
    """What is still to be given away of one stratum."""

    needs: dict[str, float]
    """Split -> rows that it still wants; below 0 where it has more than its share."""
    groups: int
    """Groups with a row in this stratum that have no split yet."""
    empty: set[str]
    """Splits that have no row of it yet."""


def assign(
    groups: Indices, strata: Sequence[Hashable], keys: Sequence[str], *, shares: Mapping[str, float], seed: int
) -> list[str]:
    """Split of each of n rows, one of `SPLITS`; every group goes to one split as a whole.

    `keys`: content hashes; rows of one key must be of one group (`ValueError`). `shares`: split -> share of the rows of
    each stratum; they sum to 1 (`ConfigError`), and a split that is not named, or has 0, stays empty.

    Groups over several strata are given away first, then those of many rows, equal ones in the order of a seeded hash
    of their smallest key, each to the split that wants most of it: so copies lie mostly in the largest split, and the
    single images, which come last, even the others out. This guarantees of a stratum:

    - with at least k groups that lie wholly in it, every split has a row of it;
    - if all its groups do, and each share of it is at least its largest group, of m rows, then every split is within
      m (k − 1) / k rows of its share: within 1 row where no image has a near-duplicate.
    """
    names = _with_share(shares)
    if not len(groups) == len(strata) == len(keys):
        raise ValueError(f"{len(groups)} groups, {len(strata)} strata and {len(keys)} keys")
    if not len(groups):
        return []
    number_of: dict[Hashable, int] = {}
    places = np.array([number_of.setdefault(stratum, len(number_of)) for stratum in strata])
    members = np.unique(groups, return_inverse=True)[1]
    # A cell is a group's part in a stratum; those of one group follow each other.
    cells, cell_rows = np.unique(members * len(number_of) + places, return_counts=True)
    spans = np.bincount(cells // len(number_of))
    cell_strata = cells % len(number_of)
    stocks = [
        _Stock(needs={name: shares[name] * size for name in names}, groups=touching, empty=set(names))
        for size, touching in zip(np.bincount(places).tolist(), np.bincount(cell_strata).tolist(), strict=True)
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
    """(held_out, excluded), each (n,) bool: rows of the generator, and rows of others in a group with one of these.

    A detector that is tested on an unseen generator must be trained on neither. `ConfigError` where no row is of it.
    """
    if len(groups) != len(generators):
        raise ValueError(f"{len(groups)} groups and {len(generators)} generators")
    held_out = np.array([generator == left_out for generator in generators], dtype=np.bool_)
    if not held_out.any():
        known = sorted({generator for generator in generators if generator is not None})
        more = f" and {len(known) - NAMED} more" if len(known) > NAMED else ""
        raise ConfigError(
            f"no image is of the generator {left_out!r}, which is to be left out; "
            f"there are: {', '.join(known[:NAMED]) or 'none'}{more}"
        )
    return held_out, np.isin(groups, groups[held_out]) & ~held_out


def _with_share(shares: Mapping[str, float]) -> list[str]:
    """The splits that get rows, after a check of the shares."""
    unknown = sorted(set(shares) - set(SPLITS))
    if unknown:
        raise ConfigError(f"splits are {', '.join(SPLITS)}, got a share of {', '.join(unknown)}")
    # `not (… <= …)` refuses NaN, too
    if any(not share >= 0.0 for share in shares.values()) or not abs(fsum(shares.values()) - 1.0) <= 1e-9:
        said = ", ".join(f"{name} {share:g}" for name, share in shares.items()) or "none"
        raise ConfigError(f"the shares of the splits must be 0 or more and sum to 1, got {said}")
    return [name for name in SPLITS if shares.get(name, 0.0) > 0.0]


def _choose(parts: Sequence[tuple[_Stock, int]], names: Sequence[str]) -> str:
    """Split that a group goes to, from its strata and the rows that it has in each.

    Where a stratum has no more groups left than splits without a row of it, such a split comes first. Otherwise the one
    with the largest Σ rows · need: this leaves Σ need², over strata and splits, smallest. Ties: order of the names.
    """

    def wanting(name: str) -> tuple[int, float]:
        missing = sum(name in stock.empty for stock, _ in parts if stock.groups <= len(stock.empty))
        # an exact sum: strata have no order
        return missing, fsum(rows * stock.needs[name] for stock, rows in parts)

    return max(names, key=wanting)


def _smallest_keys(members: Sequence[int], keys: Sequence[str], count: int) -> list[str]:
    """Smallest key of each group."""
    group_of: dict[str, int] = {}
    smallest: list[str | None] = [None] * count
    for member, key in zip(members, keys, strict=True):
        if group_of.setdefault(key, member) != member:
            raise ValueError(f"rows of the key {key!r} are in two groups: one image would lie in two splits")
        known = smallest[member]
        if known is None or key < known:
            smallest[member] = key
    return [key for key in smallest if key is not None]


def _digests(keys: Sequence[str], seed: int) -> npt.NDArray[np.uint64]:
    """(g, 2) uint64: 128 bits that order keys at random, otherwise for each seed."""
    hashes = b"".join(blake2b(f"{seed} {key}".encode(), digest_size=16).digest() for key in keys)
    return np.frombuffer(hashes, ">u8").reshape(-1, 2).astype(np.uint64)
