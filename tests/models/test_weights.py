"""Getting weights into models: strict, safe, and one clear line when something is wrong."""

import argparse
import hashlib
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from kinema.models import weights as weights_module
from kinema.models.backbones.vision_transformer import CONFIGS
from kinema.models.flowfeat.model import VARIANTS, FlowFeat
from kinema.models.weights import (
    LEDGER,
    NonCommercialWeightsWarning,
    PublishedWeights,
    download,
    file_sha256,
    load_weights,
    published_file,
    read_state_dict,
    resolve_weights,
)


def make_model(value: float = 0.0) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    return model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def values(model: torch.nn.Module) -> set[float]:
    return {v for p in model.parameters() for v in p.flatten().tolist()}


STATE = make_model(1.5).state_dict()


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {f"module.{k}": v for k, v in STATE.items()},
        {f"module.module.{k}": v for k, v in STATE.items()},
        {"model": STATE, "epoch": 3},
        {"state_dict": {f"module.{k}": v for k, v in STATE.items()}, "args": argparse.Namespace(lr=1.0)},
        {
            "student": {},
            "teacher": {f"module.backbone.{k}": v for k, v in STATE.items()} | {"module.head.w": torch.ones(1)},
        },
    ],
    ids=["plain", "module", "twice", "model", "state_dict", "dino"],
)
def test_every_usual_nesting_loads(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    assert values(load_weights(make_model(), tmp_path / "w.pth", "toy")) == {1.5}


def test_safetensors_load(tmp_path):
    save_file({f"module.{k}": v for k, v in STATE.items()}, tmp_path / "w.safetensors")
    assert values(load_weights(make_model(), str(tmp_path / "w.safetensors"), "toy")) == {1.5}


def test_no_weights_leaves_the_model_as_it_is():
    assert values(resolve_weights(make_model(0.25), "toy", pretrained=False, weights=None)) == {0.25}


def test_all_wrong_keys_are_listed_in_one_line_and_nothing_is_loaded(tmp_path):
    state = dict(STATE)
    del state["0.bias"], state["1.weight"]
    state["1.bias"] = torch.ones(7)
    state["extra"] = state["more"] = torch.ones(1)
    torch.save(state, tmp_path / "w.pth")
    model = make_model(0.25)
    with pytest.raises(ValueError) as error:
        load_weights(model, tmp_path / "w.pth", "toy")
    message = str(error.value)
    assert "\n" not in message and "toy" in message and "w.pth" in message
    assert "missing: 0.bias, 1.weight" in message
    assert "unexpected: extra, more" in message
    assert "1.bias [7] instead of [2]" in message
    assert values(model) == {0.25}


def _write_bad(kind, path):
    good = path.with_name("good.pth")
    torch.save(STATE, good)
    legacy = path.with_name("legacy.pth")
    torch.save(STATE, legacy, _use_new_zipfile_serialization=False)
    contents = {
        "empty": b"",
        "text": b"<html>404 not found</html>",
        "noise": bytes(range(256)) * 40,
        "cut": good.read_bytes()[: good.stat().st_size // 2],
        "cut_legacy": legacy.read_bytes()[: legacy.stat().st_size // 2],
        "code": pickle.dumps({"w": print}),
        "list": None,
        "no_tensors": None,
    }
    if contents[kind] is not None:
        path.write_bytes(contents[kind])
    else:
        torch.save([1, 2] if kind == "list" else {"model": {"epoch": 3}}, path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["empty", "text", "noise", "cut", "cut_legacy", "code", "list", "no_tensors"])
def test_files_that_are_no_checkpoints(kind, tmp_path):
    _write_bad(kind, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth") as error:
        load_weights(make_model(), tmp_path / "w.pth", "toy")
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_an_old_file_cut_anywhere_is_named(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in range(1, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"w\.pth"):
            read_state_dict(path)


@pytest.mark.parametrize("kind", ["empty", "text", "cut"])
def test_files_that_are_no_safetensors(kind, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(STATE, path)
    path.write_bytes({"empty": b"", "text": b"hello there, no tensors", "cut": path.read_bytes()[:-8]}[kind])
    with pytest.raises(ValueError, match=r"w\.safetensors"):
        load_weights(make_model(), path, "toy")


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Payload()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_weights(make_model(), tmp_path / "w.pth", "toy")
    assert not (tmp_path / "ran").exists()


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.pth.*does not exist"):
        load_weights(make_model(), tmp_path / "nowhere.pth", "toy")
    with pytest.raises(ValueError, match="is a folder"):
        load_weights(make_model(), tmp_path, "toy")


def test_download_is_kept_and_read_once(tmp_path, cache):
    source = tmp_path / "source.pth"
    torch.save(STATE, source)
    assert values(load_weights(make_model(), source.as_uri(), "toy")) == {1.5}
    source.unlink()  # the second time the copy serves
    assert values(load_weights(make_model(), source.as_uri(), "toy")) == {1.5}
    assert [p.name for p in cache.rglob("*") if p.is_file()] == ["source.pth"]


def test_files_of_one_name_from_two_places_are_two_files(tmp_path):
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        torch.save(make_model(value).state_dict(), tmp_path / folder / "w.pth")
    loaded = [values(load_weights(make_model(), (tmp_path / f / "w.pth").as_uri(), "toy")) for f in ("a", "b")]
    assert loaded == [{1.0}, {2.0}]


def test_download_with_another_hash_is_refused_and_not_kept(tmp_path, cache):
    source = tmp_path / "w.pth"
    source.write_bytes(b"tampered")
    with pytest.raises(ValueError, match=hashlib.sha256(b"tampered").hexdigest()):
        download(source.as_uri(), sha256="0" * 64)
    assert not [p for p in cache.rglob("*") if p.is_file()]


def test_damaged_copy_in_the_cache_is_noticed(tmp_path):
    source = tmp_path / "w.pth"
    source.write_bytes(b"good")
    kept = download(source.as_uri(), sha256=file_sha256(source))
    kept.write_bytes(b"bad")
    with pytest.raises(ValueError, match="delete the file"):
        download(source.as_uri(), sha256=file_sha256(source))


def test_address_that_does_not_answer(tmp_path):
    with pytest.raises(ValueError, match="cannot download file:.*gone.pth"):
        load_weights(make_model(), (tmp_path / "gone.pth").as_uri(), "toy")
    with pytest.raises(ValueError, match="only http, https and file"):
        load_weights(make_model(), "s3://bucket/w.pth", "toy")


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "occupied").write_text("a file, not a folder")
    monkeypatch.setenv("KINEMA_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(ValueError, match="cannot write to the cache .*KINEMA_CACHE"):
        download((tmp_path / "w.pth").as_uri())


def test_pretrained_takes_the_file_out_of_a_published_archive(tmp_path, monkeypatch):
    torch.save({f"module.{k}": v for k, v in STATE.items()}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "models.zip", "w") as archive:
        archive.write(tmp_path / "w.pth", "models/w.pth")
    entry = PublishedWeights(
        (tmp_path / "models.zip").as_uri(),
        paper="",
        licence="MIT",
        sha256=file_sha256(tmp_path / "w.pth"),
        archive_member="models/w.pth",
    )
    monkeypatch.setitem(weights_module.LEDGER, "toy", entry)
    assert values(resolve_weights(make_model(), "toy", pretrained=True, weights=None)) == {1.5}


def test_gated_and_unknown_weights_say_what_to_do():
    with pytest.raises(ValueError, match="gated.*weights=FILE"):
        published_file("dinov3_vits16")
    with pytest.raises(ValueError, match="no published weights are known for 'nothing'"):
        published_file("nothing")


def test_non_commercial_licence_is_said_aloud(tmp_path, recwarn):
    torch.save(STATE, tmp_path / "w.pth")
    load_weights(make_model(), tmp_path / "w.pth", "dino_vits16")
    assert not [w for w in recwarn if w.category is NonCommercialWeightsWarning]
    with pytest.warns(NonCommercialWeightsWarning, match="CC BY-NC"):
        load_weights(make_model(), tmp_path / "w.pth", "mae_vitb16")


def test_fixed_positions_of_another_size_are_resampled_on_the_way_in(tmp_path):
    torch.manual_seed(0)
    published = FlowFeat("mae_vitb16")
    torch.save(published.state_dict(), tmp_path / "w.pth")
    other = FlowFeat("mae_vitb16", image_size=(96, 128))
    load_weights(other, tmp_path / "w.pth", "toy")
    assert other.encoder.pos_embed.shape == (1, 1 + 6 * 8, 768)
    torch.testing.assert_close(other.encoder.cls_token, published.encoder.cls_token)


def test_ledger_covers_every_backbone_and_variant():
    assert set(CONFIGS) | {f"flowfeat/{v}" for v in VARIANTS} | {"raft", "raft_small"} <= set(LEDGER)
    for name, entry in LEDGER.items():
        assert entry.url.startswith("https://") and entry.licence and entry.paper, name
        assert entry.non_commercial == ("NC" in entry.licence), name


def test_ledger_knows_the_hash_of_the_published_raft_small(shared_data):
    assert file_sha256(shared_data / "weights" / "raft-small.pth") == LEDGER["raft_small"].sha256
    state = read_state_dict(shared_data / "weights" / "raft-small.pth")
    assert sum(v.numel() for v in state.values()) == 990_162
    assert not any(k.startswith("module.") for k in state)
