"""What the metrics of a stream cost: the workers' report per block, and the driver's per snapshot.

    python -m benchmarks.metrics_overhead

Starts an embedded cluster that collects metrics, unlike that of a command. Prints CPU time of this process, which
stands for the worker and for the driver in turn; `before` is the report of a block without the metrics' numbers.
"""

import os
import statistics
import time
from collections.abc import Callable

from jobs.cluster import embedded

BLOCKS = 2000
SNAPSHOTS = 500
IMAGES = 128
ROUNDS = 5


def main() -> None:
    """Measure and print."""
    os.environ |= {"RAY_enable_metrics_collection": "1"}
    import ray

    from jobs.cluster import resources
    from jobs.pipeline import progress
    from jobs.pipeline.metrics import Snapshot, StreamMetrics
    from jobs.pipeline.rows import ProgressReporter
    from jobs.telemetry import export

    assert "RAY_enable_metrics_collection" in embedded.NO_METRICS
    resources.connect("local")
    board = progress.start_board("nsnet-overhead", 2.0, 30.0)
    reporter = ProgressReporter(board_name="nsnet-overhead")
    ray.get(board.snapshot.remote())
    rows = [{"status": "scored", "requests": 1, "error_class": None}] * IMAGES
    fetched = [b"image"] * IMAGES

    def before() -> None:
        again, failed = (sum(row["requests"] > 1 for row in rows), sum(row["status"] == "failed" for row in rows))
        board.add.remote({"prepared": len(rows), "asked_again": again, "failed": failed})

    def after() -> None:
        reporter.passed(
            "preparing", len(rows), [row["error_class"] for row in rows if row["status"] == "failed"],
            prepared=len(rows),
            requests_repeated=sum(max(0, row["requests"] - 1) for row in rows),
            fetched_bytes=sum(len(data) for data in fetched if isinstance(data, bytes)),
        )  # fmt: skip

    def microseconds(report: Callable[[], None]) -> float:
        started = time.process_time()
        for _ in range(BLOCKS):
            report()
        spent = time.process_time() - started
        ray.get(board.snapshot.remote())
        return spent / BLOCKS * 1e6

    taken: dict[str, list[float]] = {"before": [], "after": []}
    for _ in range(ROUNDS):  # in turn
        for name, report in (("before", before), ("after", after)):
            taken[name].append(microseconds(report))
    for name, values in taken.items():
        low, median, high = min(values), statistics.median(values), max(values)
        print(f"worker, {name}: {median:.0f} us of CPU per block ({low:.0f} to {high:.0f})")
    assert export.is_connected()
    metrics = StreamMetrics("score", 10**6, ("prepared", "captioned", "scored"))
    started = time.process_time()
    for i in range(1, SNAPSHOTS + 1):  # all that may grow does, each second
        counts = dict.fromkeys(("prepared", "captioned", "scored", "fetched_bytes", "requests_repeated"), i)
        images = {(stage, f"Error{k}"): i for stage in ("preparing", "captioning", "scoring") for k in range(5)}
        seconds = dict.fromkeys(("fetching", "decoding", "captioning", "scoring", "waiting"), float(i))
        metrics.report(Snapshot(counts, seconds, images, []))
    print(f"driver: {(time.process_time() - started) / SNAPSHOTS * 1e6:.0f} us of CPU per snapshot, one each second")


if __name__ == "__main__":
    main()
