"""Which stage holds a run, from the seconds that its processes spent.

Ray Data sends blocks to model actors ahead of time. So an actor that waits between two blocks lacks prepared images,
unless the output's store is slow: writing is Ray's, and is not measured.
"""

from collections.abc import Mapping
from typing import Final

FETCHING: Final = "fetching"
DECODING: Final = "decoding"
"""Parts of preparing: tasks wait for the next images' bytes, or decode and choose patches."""
WAITING: Final = "waiting"
"""Model actors wait for prepared images."""
WAITING_FOR_MODELS: Final = "waiting for other models"
"""Model actors wait for the actors of another pool."""
OTHERS: Final = (FETCHING, DECODING, WAITING, WAITING_FOR_MODELS)
"""All that is not the work of a model stage."""
MIN_SECONDS: Final = 20.0
"""Minimum seconds of the last stage's processes, all together, from which a statement is made."""
MODELS_WAIT: Final = 0.1
"""Share of their time that model actors wait at most, if the models hold the run."""


def holding_stage(seconds: Mapping[str, float]) -> str | None:
    """Name of the stage that holds the run: `fetching`, `decoding`, or a model stage such as `score`.

    `seconds`: seconds by stage of all processes; a model stage is each name that is not in `OTHERS`. None: fewer than
    `MIN_SECONDS` were measured.
    """
    models = {name: spent for name, spent in seconds.items() if name not in OTHERS}
    preparing = {name: seconds.get(name, 0.0) for name in (DECODING, FETCHING)}
    waited = seconds.get(WAITING, 0.0)
    measured = sum(models.values()) + waited if models else sum(preparing.values())
    if measured < MIN_SECONDS:
        return None
    if models and waited <= MODELS_WAIT * measured:
        return max(models, key=models.__getitem__)
    return max(preparing, key=preparing.__getitem__)


def statement(seconds: Mapping[str, float], images: Mapping[str, int]) -> str | None:
    """`holding_stage` as a line for the user, with the shares that it follows from; None as there.

    `images`: those that the seconds of a model stage were spent on.
    """
    holder = holding_stage(seconds)
    if holder is None:
        return None
    models = {name: spent for name, spent in seconds.items() if name not in (FETCHING, DECODING)}
    preparing = {name: seconds[name] for name in (FETCHING, DECODING) if name in seconds}
    shares = "; ".join(
        f"{who} {_shares(spent)}"
        for who, spent in (("model actors", models), ("preparing tasks", preparing))
        if sum(spent.values())
    )
    worked = {name: count for name, count in sorted(images.items()) if count and name not in OTHERS}
    times = ", ".join(f"{name} {milliseconds(seconds[name] / count)}" for name, count in worked.items())
    return f"{holder} holds the run ({shares})" + (f"; per image: {times}" if times else "")


def milliseconds(seconds: float) -> str:
    """Seconds per image as text."""
    return f"{1000.0 * seconds:.1f} ms"


def _shares(seconds: Mapping[str, float]) -> str:
    total = sum(seconds.values())
    return ", ".join(f"{name} {spent / total:.0%}" for name, spent in sorted(seconds.items()))
