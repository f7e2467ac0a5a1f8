"""What stages write where a number is nan: null."""

import io
import json
import math

import pytest

from kinema.pipelines.artifacts.tables import canonical_json
from kinema.pipelines.page.json_answer import JsonAnswer
from kinema.pipelines.summary import print_summary
from kinema.pipelines.train.meter import PROGRESS_FILE, MetricsFile, ProgressFile, read_metrics
from kinema.pipelines.workflow import _write_stamp


def strict(text: str | bytes) -> object:
    return json.loads(text, parse_constant=pytest.fail)


def test_metrics_and_progress_of_a_run(tmp_path):
    metrics = MetricsFile(tmp_path, 0)
    metrics.write(3, {"loss": math.inf, "rate": 2.0})
    metrics.close()
    assert read_metrics(tmp_path) == [{"step": 3, "loss": None, "rate": 2.0}]
    ProgressFile(tmp_path).update(3, math.nan)
    assert strict((tmp_path / PROGRESS_FILE).read_text()) == {"step": 3, "loss": None}


def test_summary_stamp_answer_and_sample(tmp_path):
    out = io.StringIO()
    print_summary({"loss": math.nan, "curve": [1.0, math.inf]}, True, out)
    assert strict(out.getvalue()) == {"loss": None, "curve": [1.0, None]}
    _write_stamp(tmp_path / "shard.json", "f", "", {"error": math.nan})
    assert strict((tmp_path / "shard.json").read_text())["summary"] == {"error": None}
    assert strict(JsonAnswer({"score": -math.inf}).body) == {"score": None}
    assert strict(canonical_json({"labels": {"x": math.nan}})) == {"labels": {"x": None}}
