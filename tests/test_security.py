"""What files and configs from elsewhere must not do: run code, leave a folder; and ports that stay on loopback."""

from __future__ import annotations

import ast
import io
import os
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kinema.configs import load_stage
from kinema.pipelines import cli
from kinema.pipelines.shard.tars import read_tar
from kinema.pipelines.train import checkpoint

ROOT = Path(__file__).parents[1]
FOLDERS = ("pipelines", "models", "configs", "kernels")
UNPICKLER = "pipelines/evaluate/tapvid/files.py"
"""TAP-Vid is published as pickles: that reader knows a handful of names and calls nothing (test_tapvid.py)."""


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Every call in our sources: file, dotted name, node."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield path.relative_to(ROOT).as_posix(), ast.unparse(node.func), node


def argument(call: ast.Call, name: str) -> object:
    return next((ast.literal_eval(k.value) for k in call.keywords if k.arg == name), None)


def test_sources_unpickle_nothing_and_run_no_text():
    found, wrong = 0, []
    for file, name, call in calls():
        if name == "torch.load":
            found += 1
            if argument(call, "weights_only") is not True:
                wrong.append((file, call.lineno, "torch.load without weights_only=True"))
        if name in ("np.load", "numpy.load") and argument(call, "allow_pickle"):
            wrong.append((file, call.lineno, "np.load with pickles"))
        if name.startswith(("pickle.", "cloudpickle.", "dill.", "joblib.")) and name.endswith(("load", "loads")):
            wrong.append((file, call.lineno, name))
        if name.endswith("Unpickler") and file != UNPICKLER:
            wrong.append((file, call.lineno, name))
        if name in ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            wrong.append((file, call.lineno, name))
        if name.endswith(("register_new_resolver", "register_resolver")):
            wrong.append((file, call.lineno, "configs could call it"))
        if name.endswith((".extractall", ".extract")) and "tar" in name:
            wrong.append((file, call.lineno, "tar members are read in place"))
        if argument_is_shell(call):
            wrong.append((file, call.lineno, "a shell"))
    assert not wrong
    assert found >= 2, "the test looks at what it should"


def argument_is_shell(call: ast.Call) -> bool:
    return any(k.arg == "shell" and getattr(k.value, "value", None) is True for k in call.keywords)


def test_no_server_of_ours_listens_beyond_loopback():
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert "0.0.0.0" not in path.read_text(), path
    hosts = [argument(call, "host") for _, name, call in calls() if name in ("uvicorn.run", "uvicorn.Config")]
    assert all(host == "127.0.0.1" for host in hosts if host is not None)
    makefile = (ROOT / "Makefile").read_text()
    assert "--host 127.0.0.1" in makefile and "--dashboard-host=127.0.0.1" in (ROOT / "ray_cluster.yaml").read_text()


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mknod, (str(self.marker),)


def test_a_checkpoint_with_a_program_in_it_is_refused(tmp_path):
    marker = tmp_path / "ran"
    folder = checkpoint.save_checkpoint(tmp_path, 1, {"w": torch.zeros(2)}, {}, {"loss": 0.0}, keep=1)
    torch.save({"optimizer": Payload(marker)}, folder / checkpoint.STATE_FILE)
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.read_state(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    ["shard: {videos: !!python/object/apply:os.mknod [MARKER]}", "shard: {videos: '${run:MARKER}'}",
     "shard: !!python/object:os.path {}", "shard: {videos: !!python/name:os.mknod }"],
)  # fmt: skip
def test_a_config_file_runs_nothing(tmp_path, text):
    marker, file = tmp_path / "ran", tmp_path / "c.yaml"
    file.write_text(text.replace("MARKER", str(marker)))
    with pytest.raises(ValueError):
        load_stage("shard", file)
    assert not marker.exists()


def test_a_setting_on_the_command_line_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    for value in (f"!!python/object/apply:os.mknod [{marker}]", f"${{run:{marker}}}"):
        try:
            load_stage("shard", None, [f"clip.seconds={value}"])
        except ValueError:
            continue
        pytest.fail(f"{value} was taken for a number")
    assert not marker.exists()


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **changes: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def test_members_of_a_tar_cannot_leave_it(tmp_path, monkeypatch):
    """Names that climb, absolute names and links outside: read in place, if at all, and nothing is written there."""
    (tmp_path / "in").mkdir()
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(b"outside")
    with tarfile.open(tmp_path / "in" / "t.tar", "w") as tar:
        add(tar, "../../climbs.mp4", b"a")
        add(tar, str(tmp_path / "absolute.mp4"), b"b")
        add(tar, "link.mp4", type=tarfile.SYMTYPE, linkname="../secret.mp4")
        add(tar, "hard.mp4", type=tarfile.LNKTYPE, linkname=str(secret))
        add(tar, "device.mp4", type=tarfile.CHRTYPE)
    url = str(tmp_path / "in" / "t.tar")
    content = read_tar("t.tar", url, frozenset({"mp4"}))
    whole = Path(url).read_bytes()
    assert {whole[one.offset : one.offset + one.size] for one in content.sources} == {b"a", b"b"}
    assert all(one.url == url for one in content.sources)
    out = tmp_path / "deep" / "out"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    assert cli.main(["shard", f"videos={url}", f"out={out}", "--json"]) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "in", "secret.mp4"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_shard_with_a_pickle_in_it_is_read_without_running_it(tmp_path):
    import webdataset as wds

    from kinema.pipelines.loader.webdataset import decoders, read_shard

    marker = tmp_path / "ran"
    with tarfile.open(tmp_path / "clips-00000000-000000.tar", "w") as tar:
        for name in ("pyd", "pkl", "pickle", "pth", "pt"):
            add(tar, f"{'0' * 32}.{name}", pickle.dumps(Payload(marker)))
        add(tar, f"{'0' * 32}.npy", pickle.dumps(Payload(marker)))
    samples = list(read_shard(str(tmp_path / "clips-00000000-000000.tar")))
    assert isinstance(samples[0]["pkl"], bytes) and not marker.exists()
    handled = [decoders()[0](f".{name}", samples[0][name]) for name in ("pyd", "pkl", "npy")]
    assert handled == [None, None, None] and not marker.exists()
    assert wds.__name__ == "webdataset"
    with pytest.raises(ValueError):
        np.load(io.BytesIO(samples[0]["npy"]))
    assert not marker.exists()
