"""Relative paths: under root=, refused in a package cache, otherwise left as they are."""

import pytest

from kinema.configs import load_stage
from kinema.configs.paths import in_package_cache

ARGUMENTS = {
    "shard": (["videos=v", "out=o"], {"videos": "v", "out": "o"}),
    "teach": (["clips=c", "out=o", "weights=w.pth", "compare=f"], {"clips": "c", "weights": "w.pth", "compare": "f"}),
    "track": (["clips=c", "flow=f", "out=o"], {"flow": "f"}),
    "train": (["clips=c", "flow=f", "out=run", "other_flow=[g]"], {"flow": "f", "other_flow": ("g",)}),
    "evaluate": (["model=run", "data=d"], {"model": "run", "data": "d"}),
    "register": (["model=run"], {"model": "run"}),
    "embed": (["clips=c", "out=o"], {"clips": "c", "out": "o"}),
    "run": (["workspace=w", "shard.videos=v"], {"workspace": "w"}),
}


@pytest.fixture
def package_cache(tmp_path, monkeypatch):
    """A working folder such as Ray makes for a job."""
    folder = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("KINEMA_ROOT", raising=False)
    return folder


@pytest.mark.parametrize("stage", list(ARGUMENTS))
def test_every_relative_path_is_named_when_it_would_be_lost(stage, package_cache):
    arguments, values = ARGUMENTS[stage]
    with pytest.raises(ValueError, match="package cache that Ray deletes; give absolute paths") as refused:
        load_stage(stage, None, arguments)
    for key, value in values.items():
        assert f"{key}={value if isinstance(value, str) else value[0]}" in str(refused.value)


@pytest.mark.parametrize("stage", list(ARGUMENTS))
@pytest.mark.parametrize("root", ["/data/shared", "s3://bucket/prefix/"])
def test_relative_paths_lie_under_the_root(stage, root, package_cache):
    arguments, values = ARGUMENTS[stage]
    config = load_stage(stage, None, [*arguments, f"root={root}"])
    for key, value in values.items():
        place = root.rstrip("/") + "/"
        assert getattr(config, key) == (f"{place}{value}" if isinstance(value, str) else (f"{place}{value[0]}",))


def test_the_root_of_the_environment_and_of_settings_of_a_model(package_cache, monkeypatch):
    monkeypatch.setenv("KINEMA_ROOT", "/data")
    arguments = ["clips=c", "flow=/abs/f", "out=run", "flowfeat.backbone_weights=b.pth", "weights=published"]
    config = load_stage("train", None, arguments)
    assert (config.clips, config.flow, config.weights) == ("/data/c", "/abs/f", "published")
    assert config.settings.backbone_weights == "/data/b.pth"


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [
        ("evaluate", ["model=raft_small", "weights=published", "data=/d", "benchmark=kitti"]),
        ("evaluate", ["model=dinov2_vits14_yt", "data=s3://b/d"]),
        ("evaluate", ["model=models:/kinema-flowfeat@champion", "data=scenes"]),
        ("embed", ["clips=/c", "out=~/o"]),
    ],
)
def test_names_addresses_and_absolute_places_pass(stage, arguments, package_cache):
    load_stage(stage, None, arguments)


def test_a_usual_folder_changes_nothing_and_a_job_elsewhere_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KINEMA_ROOT", raising=False)
    assert load_stage("shard", None, ["videos=v", "out=o"]).out == "o"
    with pytest.raises(ValueError, match="videos=v, out=o are relative paths"):
        load_stage("shard", None, ["videos=v", "out=o"], away=True)
    with pytest.raises(ValueError, match="workspace=workspace is a relative path"):
        load_stage("run", "demo", ["workspace=workspace"], away=True)
    with pytest.raises(ValueError, match="root=here is relative"):
        load_stage("shard", None, ["videos=v", "out=o", "root=here"])
    assert in_package_cache(tmp_path / "runtime_resources" / "x") and not in_package_cache(tmp_path)
