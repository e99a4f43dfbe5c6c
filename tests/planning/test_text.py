"""What a person reads of a plan."""

from dataclasses import replace

import pytest

from jobs.planning.plan import Cluster, Prices, forecast
from jobs.planning.rates import GPU_RATES
from jobs.planning.text import WIDTH, as_text
from tests.support.rates import HOURS, RATES, WORKLOAD, file_of

CLUSTER = Cluster(gpus=4, cpus=7, cpus_per_gpu=1)
TEXT = """\
4 GPUs, 7 CPUs, 55.5 GiB of memory: 1,000,000 images in 3.07 hours (deadline: 3.5)
CPUs: 4 on nodes with GPUs, 3 on other nodes
memory: 7.7 GiB for each GPU and 3.5 GiB for each CPU; 2.4 GiB of all is Ray's object store
cost: 25.50, or 25.50 per million images
The rates of GPUs are estimates, not measurements. Measure one GPU before you rely on this plan.

stage       runs on         images/s of one  busy  slack
--------------------------------------------------------
fetching    6 CPUs                      100   33%   none
decoding    6 CPUs                       50   67%   none
captioning  4 GPUs                      100   50%   none
scoring     4 GPUs                      100   50%   none
writing     1 writing task            1,000   20%  +400%

The bottleneck is decoding: the stream makes 100 images/s.

assumptions
  An image has 1 megapixels and 500,000 bytes.
  The hours hold 0.02 for start-up and 0.28 for listing and publishing by one process. They hold no
    time for getting machines.
"""


def test_text_begins_with_the_answer_and_goes_on_with_stages_and_assumptions() -> None:
    made = forecast(WORKLOAD, CLUSTER, file_of(), deadline_hours=3.5, prices=Prices(gpu=2.0, cpu=0.1))
    assert as_text(made).startswith(TEXT)
    assert max(map(len, as_text(made).splitlines())) <= WIDTH


def test_text_ends_with_the_machine_of_the_rates_and_what_was_measured() -> None:
    made = forecast(WORKLOAD, CLUSTER, file_of(measured=("efficiency", "task_bytes")))
    rates = as_text(made).partition("\nrates\n")[2].splitlines()
    assert rates[:4] == [
        "  machine: a machine",
        "  2026-11-29, bf16; ray 2.60.0",
        "  measured: efficiency, task_bytes",
        "  estimates: prepare_images_per_s, prepare_megapixels, prepare_fixed_seconds, fetch_images_per_s,",
    ]
    nothing = as_text(forecast(WORKLOAD, CLUSTER, file_of(versions={})))
    assert "  measured: none\n" in nothing and "; no versions given\n" in nothing


@pytest.mark.parametrize(("measured", "warned"), [((), True), (GPU_RATES[:1], True), (GPU_RATES, False)])
def test_estimated_rates_of_gpus_are_said_with_the_answer(measured: tuple[str, ...], warned: bool) -> None:
    made = forecast(WORKLOAD, CLUSTER, file_of(replace(RATES, both_images_per_s=50.0), measured=measured))
    assert ("The rates of GPUs are estimates" in as_text(made).partition("\nstage")[0]) == warned


def test_text_says_what_is_special_of_a_plan() -> None:
    made = forecast(replace(WORKLOAD, known_captions=0.3), CLUSTER, file_of())
    assert "; 30% of the captions are known.\n" in as_text(made)
    assert "deadline" not in as_text(made) and "cost" not in as_text(made)
    slow = forecast(WORKLOAD, CLUSTER, file_of(replace(RATES, serial_images_per_s=50.0)))
    assert "But most of the time is listing and publishing" in " ".join(as_text(slow).split())
    fast = forecast(WORKLOAD, CLUSTER, file_of(replace(RATES, write_images_per_s=1e6)))
    assert "  ×5,000\n" in as_text(fast)
    one = forecast(WORKLOAD, Cluster(gpus=1, cpus=1, cpus_per_gpu=1), file_of())
    assert as_text(one).startswith("1 GPU, 1 CPU, ")


def test_deadline_is_rounded_for_the_reader_only() -> None:
    made = forecast(WORKLOAD, CLUSTER, file_of(), deadline_hours=HOURS)
    assert "in 3.07 hours (deadline: 3.07222)" in as_text(made)
