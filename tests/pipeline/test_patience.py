"""What hostile images may cost: short first tries, second tries while the budget lasts, nothing twice. Costs 4 s."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.dataset import schema
from jobs.dataset.plan import Selection
from jobs.isolation.guard import WALL_FACTOR, Zygote
from jobs.pipeline import patience
from jobs.pipeline.decoding import GuardedDecoder
from jobs.pipeline.patience import Patience
from jobs.pipeline.poison import SECONDS_PER_CPU, SLOW_SHARE, Budget, key
from jobs.runs import failures, products, publication
from jobs.runs.execution import Request
from jobs.runs.failures import remembered
from jobs.storage import parquet, uris, writing
from nsnet.config import to_dict
from nsnet.errors import DecoderCrashError, ImageBudgetError, ImageCorruptError, ImageTimeoutError, StorageError
from nsnet.images import DecodeLimits
from nsnet.patches import PatchConfig
from nsnet.preparation import PreparationConfig
from tests.support.tables import image_file, verdict_row

CONFIG = PreparationConfig(
    patches=(PatchConfig(patch_px=8, mosaic_px=16),), limits=DecodeLimits(max_seconds=0.6)
)  # fmt: skip
GOOD = image_file()


class Decoder(GuardedDecoder):
    """A decoder that counts its tries."""

    tries: list[float]

    def prepare(self, image: bytes, transform: str = "", seed: int = 0, max_seconds: float | None = None) -> Any:
        self.tries.append(max_seconds or 0.0)
        return super().prepare(image, transform, seed, max_seconds)


class Lender:
    """A budget that lends what the test says."""

    def __init__(self, *leases: float) -> None:
        self.leases = list(leases)
        self.settled: list[tuple[float, float, float]] = []

    def lease(self, seconds: float) -> float:
        return min(seconds, self.leases.pop(0))

    def settle(self, leased: float, good: float, slow: float) -> None:
        self.settled.append((leased, good, slow))


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with closing(Zygote("tests.support.services.poisoned")) as zygote, closing(Decoder(CONFIG, zygote)) as decoder:
        yield decoder


@pytest.fixture
def tries(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    monkeypatch.setattr(patience, "FIRST_SECONDS", 0.1)
    decoder.tries = []
    return decoder.tries


def test_good_image_is_tried_once(decoder: Decoder, tries: list[float]) -> None:
    one = Patience(decoder, Lender())
    assert one.first(GOOD, "a", "", 0) is not None
    assert tries == [pytest.approx(0.1 + len(GOOD) * patience.FIRST_SECONDS_PER_BYTE)]


def test_slow_image_is_tried_once_more_with_the_full_limit_and_never_again(
    decoder: Decoder, tries: list[float]
) -> None:
    lender = Lender(99.0)
    one = Patience(decoder, lender)
    assert one.first(b"POISON compute", "a", "", 0) is None
    with pytest.raises(ImageTimeoutError, match=r"longer than 0\.6 s"):
        one.again(b"POISON compute", "a", "", 0)
    assert tries == [pytest.approx(0.1, abs=0.01), 0.6]
    ((leased, _, slow),) = lender.settled
    assert leased == 0.6 and slow == pytest.approx(0.6, abs=0.1)
    with pytest.raises(ImageTimeoutError, match="the same bytes were tried before"):
        one.first(b"POISON compute", "a", "", 0)
    with pytest.raises(ImageTimeoutError, match="the same bytes were tried before"):
        one.again(b"POISON compute", "a", "", 0)
    assert len(tries) == 2


def test_slow_image_that_is_done_in_time_is_good(decoder: Decoder, tries: list[float]) -> None:
    lender = Lender(99.0)
    one = Patience(decoder, lender)
    assert one.again(GOOD, "a", "", 0) is not None
    assert [(leased, good) for leased, good, _ in lender.settled] == [(0.6, 0.0)]


@pytest.mark.parametrize(("lease", "count"), [(0.0, 1), (0.2, 2)])
def test_slow_image_that_the_budget_does_not_suffice_for_is_left_to_the_next_run(
    lease: float, count: int, decoder: Decoder, tries: list[float]
) -> None:
    lender = Lender(lease)
    one = Patience(decoder, lender)
    assert one.first(b"POISON compute", "a", "", 0) is None
    with pytest.raises(ImageBudgetError, match="budget for slow images is spent: the next run tries again"):
        one.again(b"POISON compute", "a", "", 0)
    assert len(tries) == count and lender.settled[-1][0] == lease
    assert one.first(b"POISON compute", "a", "", 0) is None  # it was not tried out: it may have its turn yet


def test_crash_is_remembered_and_not_tried_again(decoder: Decoder, tries: list[float]) -> None:
    one = Patience(decoder, Lender())
    for _ in range(3):
        with pytest.raises(DecoderCrashError, match="SIGSEGV"):
            one.first(b"POISON segfault", "a", "", 0)
    assert len(tries) == 1
    with pytest.raises(DecoderCrashError):  # under a transform it is another image
        one.first(b"POISON segfault", "a", "jpeg:75", 0)
    assert len(tries) == 2


def test_damaged_image_is_not_remembered(decoder: Decoder, tries: list[float]) -> None:
    one = Patience(decoder, Lender())
    for _ in range(2):
        with pytest.raises(ImageCorruptError):
            one.first(b"POISON answer", "a", "", 0)
    assert len(tries) == 2


def test_what_failed_in_an_earlier_run_is_not_tried(decoder: Decoder, tries: list[float]) -> None:
    one = Patience(decoder, Lender())
    one.remembered = {key("a", ""): ("ImageTimeoutError", "30 s (in run r)")}
    with pytest.raises(ImageTimeoutError, match=r"^30 s \(in run r\)$"):
        one.first(b"POISON compute", "a", "", 0)
    assert tries == [] and one.first(GOOD, "b", "", 0) is not None


def test_limit_below_the_first_try_is_the_only_one(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_SECONDS", 5.0)
    decoder.tries = []
    with pytest.raises(ImageTimeoutError):
        Patience(decoder, Lender()).first(b"POISON sleep", "a", "", 0)
    assert decoder.tries == [0.6]


def test_first_try_grows_with_what_most_images_take(decoder: Decoder, tries: list[float]) -> None:
    one = Patience(decoder, Lender())
    for seconds in [0.005] * patience.MIN_SEEN + [5.0] * (patience.MIN_SEEN - 1):
        one._see(seconds)
    one.first(GOOD, "a", "", 0)
    for seconds in [0.05] * 1000:
        one._see(seconds)
    assert len(one._ordered) == len(one._seen) == patience.MAX_SEEN  # all others are forgotten
    one.first(GOOD, "b", "", 0)
    assert [round(seconds, 2) for seconds in tries] == [patience.MIN_FIRST_SECONDS, 0.5]


def test_process_forgets_the_oldest(decoder: Decoder, tries: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "MAX_REMEMBERED", 2)
    one = Patience(decoder, Lender())
    for name in "abc":
        with pytest.raises(DecoderCrashError):
            one.first(b"POISON segfault", name, "", 0)
    assert [*one._failed] == ["b ", "c "]


# The budget of a run.


def test_budget_begins_with_one_whole_try_at_least() -> None:
    budget = Budget(cpus=0.5, max_seconds=30.0)
    assert budget.lease(30.0) == 30.0
    budget.settle(30.0, 0.0, 30.0)
    assert budget.lease(30.0) == 0.0


def test_budget_is_spent_however_a_try_ends_and_lends_what_is_left() -> None:
    budget = Budget(cpus=1.0, max_seconds=30.0)
    budget.settle(budget.lease(30.0) or 0.0, 0.0, 13.0)
    assert budget.lease(30.0) == 17.0
    budget.settle(17.0, 0.0, 16.5)
    assert budget.lease(30.0) == 0.0


def test_budget_grows_with_what_the_other_images_took() -> None:
    budget = Budget(cpus=1.0, max_seconds=30.0)
    budget.settle(0.0, 30.0 / SLOW_SHARE, 30.0)
    assert budget.lease(30.0) == 0.0
    budget.settle(0.0, 10.0 / SLOW_SHARE, 0.0)
    assert budget.lease(30.0) == 10.0


def test_budget_grows_with_the_cluster() -> None:
    budget, granted = Budget(cpus=60.0, max_seconds=30.0), 0
    while budget.lease(30.0):
        budget.settle(30.0, 0.0, 30.0)
        granted += 1
    assert granted == SECONDS_PER_CPU * 60.0 / 30.0


def test_as_many_second_tries_as_cpus_run_at_once_and_others_wait_for_what_is_left() -> None:
    budget = Budget(cpus=2.0, max_seconds=30.0)
    assert [budget.lease(30.0) for _ in range(4)] == [30.0, 30.0, None, None]
    budget.settle(30.0, 0.0, 3.0)
    assert budget.lease(30.0) == 27.0 and budget.lease(30.0) is None
    budget.settle(30.0, 0.0, 27.0)
    assert budget.lease(30.0) == 0.0


def test_lease_of_a_worker_that_died_is_lent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(cpus=1.0, max_seconds=30.0)
    assert budget.lease(30.0) == 30.0 and budget.lease(30.0) is None
    later = time.monotonic() + WALL_FACTOR * 30.0
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert budget.lease(30.0) == 30.0


def test_many_second_tries_run_at_once_where_the_budget_suffices_for_all() -> None:
    budget = Budget(cpus=2.0, max_seconds=30.0)
    budget.settle(0.0, 16 * 30.0 / SLOW_SHARE, 0.0)
    assert [budget.lease(30.0) for _ in range(17)] == [30.0] * 16 + [None]


# Earlier runs.

LIMITS = to_dict(DecodeLimits())


def run_of(number: int) -> str:
    return f"2026010{number}T000000Z-00000{number}"


def publish(out: str, number: int, rows: list[dict[str, Any]], **record: Any) -> None:
    run = publication.Run(out=out, run_id=run_of(number))
    path = f"{run.final}/part-00000-00000000.parquet".removeprefix(f"{out}/")
    table = pa.Table.from_pylist(rows, schema=schema.VERDICTS)
    parquet.write(table.to_batches(), schema.VERDICTS, uris.join(out, path))
    counts = {"error_class": {row["error_class"]: 1 for row in rows if row["error_class"]}}
    writing.write_json(
        run.record,
        {
            "run_id": run.run_id, "product": "verdicts", "files": [{"path": path}], "counts": counts,
            "settings": {"limits": LIMITS}, "versions": {"pillow": failures.version("pillow")}, **record,
        },
    )  # fmt: skip


def asked(out: str, **selection: Any) -> Request:
    return Request(
        source="s", out=out, product=products.VERDICTS, maker="d", settings={"limits": LIMITS},
        selection=Selection(**selection),
    )  # fmt: skip


def failed_row(name: str, kind: str, **values: Any) -> dict[str, Any]:
    return (
        verdict_row(name, None, content_hash=f"hash of {name}", error_class=kind, error_message=f"of {name}") | values
    )


def test_contents_that_hang_or_kill_are_remembered_across_runs(tmp_path: Path) -> None:
    out = str(tmp_path)
    publish(
        out, 1,
        [
            failed_row("slow", "ImageTimeoutError"), failed_row("crash", "DecoderCrashError", transform="jpeg:75"),
            failed_row("damaged", "ImageCorruptError"), failed_row("unlucky", "ImageBudgetError"),
            failed_row("gone", "ImageTimeoutError", content_hash=None), verdict_row("good", 0.5, content_hash="h"),
        ],
    )  # fmt: skip
    assert remembered(asked(out)) == {
        "hash of slow ": ("ImageTimeoutError", f"of slow (in run {run_of(1)})"),
        "hash of crash jpeg:75": ("DecoderCrashError", f"of crash (in run {run_of(1)})"),
    }
    assert remembered(asked(out, retry_failed=True)) == remembered(asked(out, rescore=True)) == {}


@pytest.mark.parametrize(
    "record",
    [{"settings": {"limits": LIMITS | {"max_seconds": 60.0}}}, {"versions": {"pillow": "1.0"}}, {"settings": {}}],
)
def test_failures_under_other_limits_or_decoders_are_not_remembered(record: dict[str, Any], tmp_path: Path) -> None:
    publish(str(tmp_path), 1, [failed_row("slow", "ImageTimeoutError")], **record)
    assert remembered(asked(str(tmp_path))) == {}


def test_newest_failures_are_remembered_where_there_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "MAX_REMEMBERED", 2)
    for number in (1, 2, 3):
        publish(str(tmp_path), number, [failed_row(f"slow {number}", "ImageTimeoutError")])
    assert [*remembered(asked(str(tmp_path)))] == ["hash of slow 3 ", "hash of slow 2 "]


def test_runs_without_such_failures_are_not_read(tmp_path: Path) -> None:
    publish(str(tmp_path), 1, [verdict_row("good", 0.5)])
    shutil.rmtree(tmp_path / "verdicts")
    assert remembered(asked(str(tmp_path))) == {}


def test_record_whose_counts_are_damaged_or_file_is_gone_is_no_traceback(tmp_path: Path) -> None:
    publish(str(tmp_path), 1, [failed_row("slow", "ImageTimeoutError")])
    path = tmp_path / "runs" / f"{run_of(1)}.json"
    record = json.loads(path.read_text())
    shutil.rmtree(tmp_path / "verdicts")
    with pytest.raises(StorageError, match=f"is missing, but its record runs/{run_of(1)}.json exists"):
        remembered(asked(str(tmp_path)))
    path.write_text(json.dumps(record | {"counts": {"error_class": None}}))
    assert remembered(asked(str(tmp_path))) == {}
