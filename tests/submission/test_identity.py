"""Ids: the same for the same command, output and date, and valid wherever Ray puts them."""

from datetime import UTC, datetime

import pytest

from jobs.submission.identity import attempt, check_id, submission_id
from nsnet.errors import UsageError

NIGHT = datetime(2026, 11, 30, 1, 0, tzinfo=UTC)


def test_same_command_output_and_date_give_the_same_id_and_any_other_another() -> None:
    first = submission_id("score", "s3://verdicts/incoming", NIGHT)
    assert first == submission_id("score", "s3://verdicts/incoming", NIGHT.replace(hour=23))
    others = {
        submission_id("caption", "s3://verdicts/incoming", NIGHT),
        submission_id("score", "s3://others/incoming", NIGHT),
        submission_id("score", "s3://verdicts/incoming", NIGHT.replace(month=12, day=1)),
    }
    assert len(others | {first}) == 4
    assert first.startswith("nsnet-score-incoming-") and first.endswith("-20261130")


@pytest.mark.parametrize("out", ["s3://bucket", "/out/Ünïcode name!", "/" + "x" * 300, "s3://b/--", "/out/..%2f%00"])
def test_id_is_valid_whatever_the_output_is_called(out: str) -> None:
    name = submission_id("score", out, NIGHT)
    assert check_id(name) == name and name == name.lower()


@pytest.mark.parametrize("name", ["", "../x", "a b", "a/b", "-a", "x" * 101, "a\n", "é"])
def test_id_that_is_no_part_of_a_file_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is no submission id"):
        check_id(name)


def test_attempts_are_numbered_from_the_second() -> None:
    assert [attempt("night", number) for number in (1, 2, 3)] == ["night", "night-2", "night-3"]
