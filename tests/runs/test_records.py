"""Records of an output: each run in exactly one of those that readers use, each read once."""

from pathlib import Path
from typing import Any

import pytest

from jobs.runs import records
from jobs.storage import listing, reading, writing
from jobs.storage.uris import Uri
from nsnet.errors import StorageError
from tests.support.nights import run_id


def own(*nights: int) -> list[dict[str, Any]]:
    return [{"run_id": run_id(night), "files": []} for night in nights]


def merged(number: int, *nights: int) -> dict[str, Any]:
    runs = [{"run_id": run_id(night), "rows": 0} for night in nights]
    return {"run_id": f"{run_id(nights[-1])[:17]}{number:06x}", "files": [], "runs": runs, "common": {}}


def runs_in(found: list[dict[str, Any]]) -> list[str]:
    return [run for record in found for run in sorted(records.run_ids(record))]


@pytest.mark.parametrize(
    ("stored", "chosen"),
    [
        ([merged(1, 0, 1, 2), *own(0, 1, 2, 3)], [merged(1, 0, 1, 2), *own(3)]),
        ([merged(1, 0, 1), merged(2, 0, 1, 2)], [merged(2, 0, 1, 2)]),
        # of two that overlap, the larger one
        ([merged(1, 0, 1), merged(2, 1, 2, 3), *own(0, 1, 2, 3)], [*own(0), merged(2, 1, 2, 3)]),
        # but a smaller one whose runs no other record has
        ([merged(1, 0, 1), merged(2, 1, 2, 3), *own(1, 2, 3)], [merged(1, 0, 1), *own(2, 3)]),
        ([merged(1, 0, 1), merged(2, 1, 2, 3), merged(3, 2, 3)], [merged(1, 0, 1), merged(3, 2, 3)]),
    ],
)
def test_each_run_is_in_one_of_the_records_to_read(stored: list[dict[str, Any]], chosen: list[dict[str, Any]]) -> None:
    for some in (stored, stored[::-1]):
        assert records.effective(some) == chosen
    assert set(runs_in(chosen)) == set(runs_in(stored)) and len(set(runs_in(chosen))) == len(runs_in(chosen))


def test_records_of_which_no_choice_has_each_run_once_are_named() -> None:
    stored = [merged(1, 0, 1, 2), merged(2, 2, 3)]
    with pytest.raises(StorageError, match=f"both hold the run {run_id(2)}, and neither can be left out") as caught:
        records.effective(stored)
    assert all(record["run_id"] in str(caught.value) for record in stored)


def test_records_are_read_once_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    for record in own(*range(4_200)):
        (tmp_path / f"runs/{record['run_id']}.json").write_text(f'{{"run_id": "{record["run_id"]}", "files": []}}')
    read, opened = reading.read_bytes, []

    def counted(uri: str, *rest: Any) -> bytes:
        opened.append(uri)
        return read(uri, *rest)

    monkeypatch.setattr(reading, "read_bytes", counted)
    out = Uri(str(tmp_path))
    first = records.stored(out)
    assert len(opened) == 4_200 and records.stored(out) == first and len(opened) == 4_200
    changed = f"{out}/runs/{run_id(1)}.json"
    writing.write_json(changed, {"run_id": run_id(1), "files": [], "new": 1})
    writing.remove_file(f"{out}/runs/{run_id(2)}.json")
    second = records.stored(out)
    assert opened[4_200:] == [changed] and len(second) == 4_199 and second[1]["new"] == 1


def test_records_that_vanish_again_and_again_end_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "versions_below", lambda folder: {f"{run_id(0)}.json": "1"})
    with pytest.raises(StorageError, match="were removed while they were read, 3 times in a row: start the command"):
        records.stored(Uri(str(tmp_path)))
