"""hubconf.py as a stranger uses it: `torch.hub.load` from a folder that knows nothing of kinema."""

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO_ROOT = Path(__file__).resolve().parents[2]
BACKBONES = {
    "dino_vits16": (16, 384, 1),
    "dino_vitb16": (16, 768, 1),
    "dinov2_vits14": (14, 384, 1),
    "dinov2_vitb14": (14, 768, 1),
    "dinov2_vits14_reg": (14, 384, 5),
    "dinov2_vitb14_reg": (14, 768, 5),
    "dinov2_vitl14_reg": (14, 1024, 5),
    "dinov3_vits16": (16, 384, 5),
}


def load(entry, **options):
    return torch.hub.load(str(REPO_ROOT), entry, source="local", **options)


@pytest.mark.parametrize(
    ("name", "facts"),
    [pytest.param(*item, marks=[pytest.mark.slow] * ("vitl14" in item[0])) for item in BACKBONES.items()],
)
@torch.no_grad()
def test_backbones(name, facts):
    patch, width, prefix = facts
    backbone = load(name, pretrained=False)
    assert not backbone.training
    x = torch.randn(1, 3, 2 * patch, 3 * patch)
    assert backbone(x).shape == (1, prefix + 6, width)
    assert backbone.tokens(x, [0])[0].shape == (1, prefix + 6, width)


@torch.no_grad()
def test_mae_is_built_for_a_size():
    assert load("mae_vitb16", image_size=(32, 48))(torch.randn(1, 3, 32, 48)).shape == (1, 7, 768)


@torch.no_grad()
def test_flowfeat_by_name():
    y_enc, y_dec = load("flowfeat", name="dinov2_vits14_yt", pretrained=False)(torch.randn(1, 3, 224, 224))
    assert y_enc.shape == (1, 384, 16, 16)
    assert y_dec.shape == (1, 128, 224, 224)


def test_raft_small_with_its_published_weights(shared_data):
    model = load("raft_small", weights=str(shared_data / "weights" / "raft-small.pth"))
    assert sum(p.numel() for p in model.parameters()) == 990_162


@pytest.mark.parametrize("name", ["sea_raft_s", "sea_raft_m", "sea_raft_l", "smurf"])
@torch.no_grad()
def test_flow_networks_load_a_checkpoint_by_name(name, tmp_path):
    state = load(name).state_dict()
    torch.save({f"module.{key}": torch.zeros_like(value) for key, value in state.items()}, tmp_path / "w.pth")
    network = load(name, weights=str(tmp_path / "w.pth"))
    assert not network.training
    flow = network(torch.rand(1, 3, 40, 50), torch.rand(1, 3, 40, 50), iters=1)
    assert flow.shape == (1, 2, 40, 50) and not flow.any()


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save(load("dino_vits16").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="do not fit dinov2_vits14.*missing: .*mask_token"):
        load("dinov2_vits14", weights=str(tmp_path / "w.pth"))


def test_every_entry_takes_pretrained_and_weights_and_has_a_help_text():
    sys.path.insert(0, str(REPO_ROOT))
    try:
        import hubconf
    finally:
        sys.path.remove(str(REPO_ROOT))
    entries = {n: v for n, v in vars(hubconf).items() if callable(v) and not n.startswith("_")}
    assert set(BACKBONES) | {"mae_vitb16", "flowfeat", "raft", "raft_small", "smurf"} <= set(entries)
    assert {"sea_raft_s", "sea_raft_m", "sea_raft_l"} <= set(entries)
    for name, entry in entries.items():
        assert {"pretrained", "weights"} <= set(inspect.signature(entry).parameters), name
        assert entry.__doc__ and "partial" not in entry.__doc__, name


SCRIPT = """
import sys
sys.path = [p for p in sys.path if not p.startswith({root!r})]
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f).lower()]
import torch
model = torch.hub.load({repo!r}, "dino_vits16", source="local")
import kinema.models.backbones.vision_transformer as module
print(module.__file__)
"""


@pytest.mark.parametrize("links", [True, False], ids=["clone", "zip"])
def test_load_from_a_folder_without_kinema(links, tmp_path):
    """A clone has links in src/kinema; a zip archive of it has text files there."""
    repo, elsewhere = tmp_path / "repo", tmp_path / "elsewhere"
    (repo / "src" / "kinema").mkdir(parents=True)
    elsewhere.mkdir()
    shutil.copy(REPO_ROOT / "hubconf.py", repo)
    shutil.copytree(REPO_ROOT / "models", repo / "models", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO_ROOT / "src" / "kinema" / "__init__.py", repo / "src" / "kinema")
    if links:
        (repo / "src" / "kinema" / "models").symlink_to("../../models")
    else:
        (repo / "src" / "kinema" / "models").write_text("../../models")
    (elsewhere / "models.py").write_text("raise RuntimeError('an unrelated module was imported')")
    script = SCRIPT.format(root=str(REPO_ROOT / "src"), repo=str(repo))
    done = subprocess.run([sys.executable, "-c", script], cwd=elsewhere, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(repo))
