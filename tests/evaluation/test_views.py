"""What is found with views that agree, and what files state: counted beside the verdicts, changing none of them."""

from typing import Any

import pytest

from jobs.evaluation.claims import stated
from jobs.evaluation.views import stability
from nsnet.metrics import tpr_at_fpr
from tests.support.tables import verdict_row, verdict_table

Rows = list[dict[str, Any]]


def row(i: int, probability: float, label: int | None, agree: bool | None, **values: Any) -> dict[str, Any]:
    verdict = "fake" if probability >= 0.5 else "real"
    fields = {"label": label, "generator": "g", "verdict": verdict, "views_agree": agree} | values
    return verdict_row(f"/{i}.jpg", probability, **fields)


def rows_where_false_alarms_disagree() -> Rows:
    """100 reals, of which the three with the highest probabilities change sides between views, and 100 fakes."""
    reals = [row(i, 0.95 if i < 3 else 0.3, 0, i >= 3) for i in range(100)]
    fakes = [row(100 + i, 0.9 if i < 80 else 0.2, 1, i % 10 > 0) for i in range(100)]
    return reals + fakes


def test_fakes_found_with_and_without_images_whose_views_disagree() -> None:
    found = stability(verdict_table(*rows_where_false_alarms_disagree()), samples=200)
    assert found is not None
    assert (found["images"], found["disagree"]) == ({"real": 100, "fake": 100}, {"real": 3, "fake": 10})
    for form in ("first_view", "agreeing"):
        labels, scores = [], []
        for item in rows_where_false_alarms_disagree():
            labels.append(item["label"])
            scores.append(item["prob_fake"] if form == "first_view" or item["views_agree"] else 0.0)
        expected = tpr_at_fpr(labels, scores, 0.01)
        assert found[form]["tpr_at_fpr_1"]["value"] == pytest.approx(expected)
    assert found["first_view"]["tpr_at_fpr_1"]["value"] == 0.0 < found["agreeing"]["tpr_at_fpr_1"]["value"] == 0.72
    low, high = (found["agreeing"]["tpr_at_fpr_1"][name] for name in ("low", "high"))
    assert low < 0.72 < high and found["agreeing"]["tpr_at_fpr_01"]["low"] is None  # 100 reals measure no 0.1 %


@pytest.mark.parametrize(
    "values", [{"views_agree": None}, {"label": None}, {"status": "failed"}, {"transform": "jpeg:50"}]
)
def test_only_labelled_images_in_several_views_count(values: dict[str, Any]) -> None:
    assert stability(verdict_table(row(0, 0.5, 1, True) | values)) is None


def test_table_without_the_column_has_no_views() -> None:
    assert stability(verdict_table(row(0, 0.5, 1, True)).drop_columns(["views_agree"])) is None


def test_statements_are_counted_by_label_and_verdict() -> None:
    table = verdict_table(
        row(0, 0.9, 1, None, c2pa_state="valid", digital_source_type="trainedAlgorithmicMedia"),
        row(1, 0.1, 1, None, c2pa_state="valid", metadata_generator="ComfyUI"),
        row(2, 0.9, 0, None, c2pa_state="none"),
        row(3, 0.9, None, None, c2pa_state="invalid"),
        row(4, 0.9, 1, None, c2pa_state="valid", status="failed"),
        row(5, 0.9, 1, None, c2pa_state="valid", transform="jpeg:50"),
    )
    counted = [(one["column"], one["value"], one["real"], one["fake"], one["unknown"], one["called_fake"])
               for one in stated(table)]  # fmt: skip
    assert counted == [
        ("c2pa_state", "invalid", 0, 0, 1, 1),
        ("c2pa_state", "valid", 0, 2, 0, 1),
        ("digital_source_type", "trainedAlgorithmicMedia", 0, 1, 0, 1),
        ("metadata_generator", "ComfyUI", 0, 1, 0, 0),
    ]
    assert stated(table.drop_columns(["c2pa_state", "digital_source_type", "metadata_generator"])) == []
