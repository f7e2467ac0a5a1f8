"""JSON is written in one place, which knows what JSON does not have."""

import ast
import json
import math
from pathlib import Path

import pytest

from kinema.configs.json_text import finite, json_text

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("configs", "kernels", "models", "pipelines")


def writers(text: str) -> list[ast.Call]:
    """Calls that make JSON past `json_text`. Kernels, which run where only torch is, may refuse nan instead."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    found = []
    for call in calls:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = getattr(getattr(call.func, "value", None), "id", "")
        if name in ("JSONResponse", "JSONEncoder") or (name in ("dumps", "dump") and owner in ("json", "")):
            found.append(call)
    return found


def refuses_nan(call: ast.Call) -> bool:
    return any(k.arg == "allow_nan" and getattr(k.value, "value", None) is False for k in call.keywords)


def test_all_json_is_written_by_one_function():
    wrong, num_files = [], 0
    for layer in LAYERS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            num_files += 1
            calls = writers(path.read_text())
            if path.name != "json_text.py":
                wrong += [
                    f"{path.relative_to(ROOT)}:{c.lineno}" for c in calls if layer != "kernels" or not refuses_nan(c)
                ]
    assert num_files > 150
    assert wrong == [], "use kinema.configs.json_text"


def test_a_writer_past_it_would_be_found():
    assert len(writers("import json\njson.dumps(1)\njson.dump(1, f)\nfrom json import dumps\ndumps(2)\n")) == 3
    assert not writers("json.loads(text)\npickle.dumps(1)\n")
    assert refuses_nan(writers("json.dumps(1, allow_nan=False)")[0])


def test_null_for_what_json_does_not_have():
    value = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": "NaN", "d": 10**30}
    assert json.loads(json_text(value), parse_constant=pytest.fail) == {
        "a": [1.5, None, [None, {"b": None}]],
        "c": "NaN",
        "d": 10**30,
    }
    assert finite(math.nan) is None and finite(0.0) == 0.0


def test_values_that_are_made_into_others_count_too():
    assert json_text({"x": {3}}, default=lambda _: [math.nan]) == '{"x": [null]}'
    with pytest.raises(TypeError):
        json_text({3})
