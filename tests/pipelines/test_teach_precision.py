"""Teachers whose products are in bf16, on a CPU: how far from float32, and who may ask for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from kinema.configs import TeachConfig, TrackConfig
from kinema.configs.models.table import MODELS
from kinema.models.flow.raft import family
from kinema.pipelines import precision, teach, track
from kinema.pipelines.scenes import Scene
from kinema.pipelines.sidecars.flow_files import read_flo, valid_pixels
from kinema.pipelines.teach.teachers import TeacherSpec, use_threads
from kinema.pipelines.track.trackers import TrackerSpec

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the folder {DATA}")


def flow_of(spec: TeacherSpec, frames: list[np.ndarray]) -> np.ndarray:
    teacher = spec.load()
    features = [teacher.features(frame) for frame in frames]
    return teacher.flow([(features[0], features[1])]).flow_px[0].numpy()


@needs_data
def test_bf16_costs_a_hundredth_of_the_error_at_most():
    """Published weights on a real pair with known flow."""
    folder = DATA / "flow" / "middlebury"
    frames = [np.ascontiguousarray(cv2.imread(str(folder / f"RubberWhale{n}.png"))[..., ::-1]) for n in (1, 2)]
    truth = read_flo(folder / "RubberWhale_flow10.flo")
    known = valid_pixels(truth)
    spec = TeacherSpec("raft_small", weights=str(DATA / "weights" / "raft-small.pth"), iters=12)
    with use_threads(1):
        flows = {name: flow_of(replace(spec, precision=name), frames) for name in ("fp32", "bf16")}
    assert flows["bf16"].dtype == np.float32
    errors = {name: np.hypot(*(flow - truth))[known].mean() for name, flow in flows.items()}
    print(errors, "difference", np.hypot(*(flows["bf16"] - flows["fp32"])).mean())
    assert 0 < np.hypot(*(flows["bf16"] - flows["fp32"])).mean() < 0.02
    assert errors["bf16"] < errors["fp32"] + 0.003


@needs_data
def test_features_that_stay_in_16_bits_for_the_lookup_cost_no_more(monkeypatch):
    """As on a GPU: maps, levels and lookups of bf16 features; on demand, and as a volume of their exact products."""
    folder = DATA / "flow" / "middlebury"
    frames = [np.ascontiguousarray(cv2.imread(str(folder / f"RubberWhale{n}.png"))[..., ::-1]) for n in (1, 2)]
    truth = read_flo(folder / "RubberWhale_flow10.flo")
    known = valid_pixels(truth)
    spec = TeacherSpec("raft_small", weights=str(DATA / "weights" / "raft-small.pth"), iters=12, precision="bf16")
    errors = {}
    with use_threads(1):
        for stays, lookup in ((False, "on_demand"), (True, "on_demand"), (True, "volume")):
            monkeypatch.setattr(family, "_multiplies_16_bits", lambda device, stays=stays: stays)
            teacher = spec.load()
            teacher.network.lookup = lookup
            # Somebody who looks on brings the layers back, which a GPU runs.
            teacher.network.update_block.register_forward_hook(lambda *seen: None)
            features = [teacher.features(frame) for frame in frames]
            assert (features[0].fmap.dtype == torch.bfloat16) is stays
            flow = teacher.flow([(features[0], features[1])]).flow_px
            assert flow.dtype == torch.float32
            errors[stays, lookup] = np.hypot(*(flow[0].numpy() - truth))[known].mean()
    print(errors)
    assert errors[True, "on_demand"] < errors[False, "on_demand"] + 0.003
    assert errors[True, "volume"] < errors[False, "on_demand"] + 0.003


SLOW = ("sea_raft_m", "sea_raft_l", "waft", "dinoflow", "alltracker", "alltracker_tiny")
NETWORKS = [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in MODELS.teachers() if n in MODELS]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_stays_near_its_own_flow(name, tmp_path):
    """Random weights: what bf16 costs in pixels is shown above, for the one network whose weights are at hand."""
    facts = MODELS[name].teacher
    if not facts.needs_weights:
        pytest.skip("no network")
    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"
    torch.save(MODELS[name].make().state_dict(), weights)
    frames = [np.ascontiguousarray(frame) for frame in Scene(3, 128, 136, 2).frames()]
    spec = TeacherSpec(name, weights=str(weights), iters=2 if facts.iters else 0)
    with use_threads(1):
        flows = {precision: flow_of(replace(spec, precision=precision), frames) for precision in ("fp32", "bf16")}
    assert flows["bf16"].dtype == np.float32 and np.isfinite(flows["bf16"]).all()
    assert flows["bf16"].shape == (2, 128, 136)
    moved, length = (np.hypot(*flow).mean() for flow in (flows["bf16"] - flows["fp32"], flows["fp32"]))
    print(name, moved / length)
    assert 0 < moved < 0.05 * length


def test_a_cpu_without_the_instructions_refuses(tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    config = TeachConfig(
        clips=str(tmp_path), out=str(tmp_path / "flow"), teacher="raft_small", precision="bf16", device="cpu"
    )
    with pytest.raises(ValueError, match="this CPU only emulates products of bf16; use precision=fp32"):
        teach._place(config, TeacherSpec("raft_small"))
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    spec, _ = teach._place(config, TeacherSpec("raft_small", precision="bf16"))
    assert (spec.device, spec.precision) == ("cpu", "bf16")
    following = TrackConfig(
        clips=str(tmp_path), out=str(tmp_path / "tracks"), tracker="cotracker3", precision="bf16", device="cpu"
    )
    spec, _ = track._place(following, TrackerSpec("cotracker3", precision="bf16"))
    assert spec.precision == "bf16"
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    with pytest.raises(ValueError, match="this CPU only emulates products of bf16; use precision=fp32"):
        track._place(following, TrackerSpec("cotracker3"))
    with pytest.raises(ValueError, match="precision=bf16: chain is no network; use precision=fp32"):
        track._place(replace(following, tracker="chain"), TrackerSpec("chain"))
