"""Measured configurations: read by card, defaults where there is none, a broken file refused with its line."""

import json

import pytest
import torch

from kinema.kernels import tuning
from kinema.kernels.tuning import Config, Key

KEY = Key("cosine_attention", "forward", "bfloat16", "D64", "full")
ROW = {
    **KEY._asdict(),
    **{"blocks": [64, 128], "warps": 4, "stages": 3, "ms": 0.25, "torch": "2.13.0", "triton": "3.9.0"},
    **{"date": "2026-11-29", "commit": "0123456789ab"},
}
DEFAULT = Config((128, 64), 8, 2)


def test_rows_are_written_read_and_replaced(tmp_path):
    path = tuning.file_of("NVIDIA H200", tmp_path)
    assert path.name == "NVIDIA_H200.json"
    tuning.write_rows(path, [ROW, {**ROW, "kernel": "keys"}])
    tuning.write_rows(path, [{**ROW, "warps": 8}])
    found = tuning.read_rows(path)
    assert found == {KEY: Config((64, 128), 8, 3), KEY._replace(kernel="keys"): Config((64, 128), 4, 3)}
    assert len(json.loads(path.read_text())) == 2


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 3: Expecting property name"),
        ("7", "line 3: it is no JSON object"),
        (json.dumps({k: v for k, v in ROW.items() if k != "ms"}), "line 3: it has no ms"),
        (json.dumps({**ROW, "speed": 1}), "line 3: nobody knows its speed"),
        (json.dumps({**ROW, "warps": "4"}), "line 3: warps='4' has the wrong type"),
        (json.dumps({**ROW, "blocks": [48, 64]}), r"line 3: blocks=\[48, 64\] must be powers of two"),
        (json.dumps({**ROW, "stages": 0}), "line 3: warps=4, stages=0 are not what a card can run"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path, line, message):
    path = tmp_path / "CARD.json"
    path.write_text(f"[\n{json.dumps(ROW)},\n{line}\n]\n")
    with pytest.raises(ValueError, match=message) as caught:
        tuning.read_rows(path)
    assert "CARD.json" in str(caught.value) and "measure again" in str(caught.value)


def test_a_card_with_a_file_uses_it_and_others_the_default(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "file_of", lambda name: tmp_path / f"{name}.json")
    tuning.write_rows(tmp_path / "known.json", [ROW])
    tuning.measured.cache_clear()
    for name, expected in (("known", Config((64, 128), 4, 3)), ("unknown", DEFAULT)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert tuning.choose_config(KEY, DEFAULT, torch.device("cuda", 0)) == expected
    assert tuning.choose_config(KEY, DEFAULT, torch.device("cpu")) == DEFAULT
    with tuning.trying(KEY, Config((32, 32), 4, 1)):
        assert tuning.choose_config(KEY, DEFAULT, torch.device("cpu")) == Config((32, 32), 4, 1)
    assert tuning.choose_config(KEY, DEFAULT, torch.device("cpu")) == DEFAULT
    tuning.measured.cache_clear()


def test_files_that_are_here_can_be_read():
    for path in tuning.FOLDER.glob("*.json"):
        assert tuning.read_rows(path)
