"""What the driver believes of a child that reads containers: it may have been taken over. Costs 1 s."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from jobs.dataset import containers
from jobs.dataset.containers import Container, ContainerError
from jobs.isolation.guard import Clock


class Liar:
    """A child, and its zygote, that says what it wants."""

    pid = os.getpid()

    def __init__(self, answers: Iterable[Any]) -> None:
        self._answers = [*answers]

    def fork(self, settings: dict[str, Any], memory_bytes: int) -> "Liar":
        return self

    def send(self, clock: Clock, header: dict[str, Any], payload: bytes = b"") -> None:
        pass

    def receive(self, clock: Clock) -> Any:
        if not self._answers:
            raise EOFError
        return self._answers.pop(0)

    def read(self, size: int, clock: Clock) -> bytes:
        return bytes(size)

    def end(self) -> int:
        return 0


def lied_to(*answers: Any, size_bytes: int = 1000) -> Container:
    liar: Any = Liar(answers)
    return Container("x", "parquet", size_bytes, lambda offset, length: bytes(length), liar)


ASKED: dict[str, Callable[[Container], Any]] = {
    "members": lambda container: container.members(),
    "describe": lambda container: container.describe(),
    "distinct": lambda container: container.distinct("a"),
    "rows": lambda container: [*container.rows(["a"], 2)],
    "group": lambda container: container.group(0),
    "images": lambda container: [*container.images(["a"], 0, 1, 100)],
}
END = {"end": True}
LIES: list[tuple[str, list[Any]]] = [
    *((name, [END]) for name in ASKED),
    *((name, [{"read": read}]) for name in ASKED for read in ([1], 7, None, ["a", "b"], [float("inf"), 1], {"a": 1})),
    *(("members", [{"members": lie} | END]) for lie in (7, [7], [[]], {"a": 1}, [["a", 0, 1, 7, None]])),
    *(("members", [{"members": [["a", at, size, "file", None]]} | END]) for at, size in ((-1, 5), (0, 1001), (5, -6))),
    ("members", [{"members": [["\ud800", 0, 1, "file", None]]} | END]),
    *(("members", [{"members": [], "behind": behind} | END]) for behind in ("x", None, float("nan"), [])),
    *(("describe", [{"columns": lie, "rows": 1, "features": ""} | END]) for lie in (7, [7], [["a", "b"]], [[1, 2, 3]])),
    *(("describe", [{"columns": [], "rows": rows, "features": ""} | END]) for rows in (None, "x", float("inf"))),
    ("describe", [{"columns": [], "rows": 1, "features": "\ud800"} | END]),
    *(("distinct", [{"distinct": lie} | END]) for lie in (7, [[1]], [{}])),
    ("distinct", [{"distinct": []}, {"distinct": []} | END]),
    *(("rows", [{"values": lie} | END]) for lie in (7, [7], [[1, 2]], [[[]]], None)),
    *(("group", [{"group": lie} | END]) for lie in (None, 7, [1], [1, 2, 3], ["a", "b"], [1, 2], [0, 0])),
    ("group", [{"group": [0, 1]}, {"group": [0, 1]} | END]),
    *(("images", [{"position": at, "size_bytes": 1} | END]) for at in (1, None, "0")),
    *(("images", [{"position": 0, "size_bytes": size} | END]) for size in (-1, 101, "x", [], float("nan"), None)),
]


@pytest.mark.parametrize(("asked", "answers"), LIES, ids=str)
def test_answer_that_makes_no_sense_costs_the_container_alone(asked: str, answers: list[Any]) -> None:
    with lied_to(*answers) as container, pytest.raises(ContainerError, match="^x: its reader sent an invalid answer$"):
        ASKED[asked](container)


def test_names_that_are_no_utf_8_are_believed() -> None:
    with lied_to({"members": [["\udcff.jpg", 0, 1, "file", None]]} | END) as container:
        assert container.members()[0][0].name == "\udcff.jpg"


@pytest.mark.parametrize(("size_bytes", "rows", "ends"), [(1000, 2, True), (2**22, 2, False), (1000, 20_000, False)])
def test_time_of_a_request_grows_with_the_file_and_its_rows(
    size_bytes: int, rows: int, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "computed", containers.SECONDS + 1)
    error = "reading it took longer than 60 s of CPU time" if ends else "rows, but has 1"
    container = lied_to({"values": [["a"]]} | END, size_bytes=size_bytes)
    with container, pytest.raises(ContainerError, match=error):
        list(container.rows(["a"], rows))
