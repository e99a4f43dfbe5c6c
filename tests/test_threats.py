"""The promises of `docs/explanation/threats.md` name tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
THREATS = TESTS.parent / "docs/explanation/threats.md"
PROMISES = THREATS.read_text(encoding="utf-8").partition("## What is promised")[2]


def test_every_promise_names_tests_that_exist() -> None:
    rows = re.findall(r"^\| (?!promise|---)(.+?) \| (.+) \|$", PROMISES.partition("## What is not")[0], re.MULTILINE)
    assert len(rows) > 10
    for promise, named in rows:
        tests = re.findall(r"`(?:([\w/]*test_\w+\.py))?::(test_\w+)`", named)
        assert tests or "make fuzz" in named, promise
        module = ""
        for given, test in tests:
            module = given or module
            assert not module.startswith("long/"), (promise, module)  # `make test` keeps what is promised
            assert f"def {test}(" in (TESTS / module).read_text(encoding="utf-8"), (promise, module, test)
