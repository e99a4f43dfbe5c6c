"""The embedded default, as `make demo` runs it: it must learn, not only run."""

from pathlib import Path

import pytest

from jobs.experiments.demo import demo
from nsnet.errors import UsageError


def test_demo_tells_held_out_fakes_from_their_real_twins(cluster: None, tmp_path: Path) -> None:
    result = demo(tmp_path, seed=0)
    group = result["generators"]["upsampler"]
    assert (group["real"], group["fake"], result["failed"]) == (150, 150, 0)
    assert group["ap"]["value"] >= 0.95
    assert group["acc"]["value"] >= 0.90
    with pytest.raises(UsageError, match="already holds a finished demo"):
        demo(tmp_path, seed=0)
