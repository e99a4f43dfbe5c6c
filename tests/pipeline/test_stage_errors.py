"""Errors of stages come through Ray Data as they were raised: it may put one of its own in their place.

Costs 15 s of the cluster that others need as well.
"""

import errno
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from jobs.cluster import resources
from jobs.pipeline.stream import _stream_error
from nsnet.errors import BundleError, StorageError

RAISED: list[tuple[Exception, type[Exception], str]] = [
    (BundleError("it was replaced"), BundleError, "^it was replaced$"),
    (OSError(errno.ENOSPC, "No space left on device"), StorageError, "^writing below /out: OSError: No space left"),
    (MemoryError("33 GiB"), StorageError, "^MemoryError: 33 GiB: out of memory"),
    (KeyError("uri"), KeyError, r"in raises\b"),
]


@pytest.fixture(autouse=True)
def no_actor_is_left() -> Iterator[None]:
    """Ray keeps the actors of a failed dataset, and their CPU, as long as anything holds its error."""
    yield
    gc.collect()


def error_of(stage: Any, *arguments: Any) -> Exception:
    """What a command gets from a stream with a stage that raises."""
    resources.configure_data()
    compute = ActorPoolStrategy(size=1) if isinstance(stage, type) else TaskPoolStrategy()
    # little CPU: Ray keeps the actors of a failed dataset as long as somebody holds its error
    dataset = ray.data.range(2).map_batches(stage, fn_args=arguments, compute=compute, num_cpus=0.1)
    with pytest.raises(Exception) as caught:
        dataset.materialize()
    return _stream_error(caught.value, "/out")


@pytest.mark.parametrize("in_actor", [False, True], ids=["task", "actor"])
def test_error_of_a_stage_comes_as_it_was_raised(in_actor: bool, cluster: None) -> None:
    def raises(batch: Any, error: Exception) -> Any:
        raise error

    class Raises:
        def __call__(self, batch: Any, error: Exception) -> Any:
            raises(batch, error)

    for error, kind, text in RAISED:
        with pytest.raises(kind, match=text):
            raise error_of(Raises if in_actor else raises, error)


def test_bug_in_the_making_of_an_actor_keeps_its_traceback(cluster: None) -> None:
    class Broken:
        def __init__(self) -> None:
            raise KeyError("uri")

        def __call__(self, batch: Any) -> Any:
            return batch

    error = error_of(Broken)
    assert not isinstance(error, StorageError) and "in __init__" in str(error)
