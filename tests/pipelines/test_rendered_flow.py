"""Rendered shots: exact motion against the pictures, against itself, and against what is asked of it."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from kinema.configs import load_stage
from kinema.configs.loader import LoaderConfig
from kinema.configs.rendered import EffectsConfig
from kinema.models.flow.dis import DIS
from kinema.pipelines import shard
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.evaluate.flow.scores import evaluate_flow
from kinema.pipelines.loader import ClipIndex, Loader
from kinema.pipelines.loader.rendered import RenderedIndex
from kinema.pipelines.scenes.rendered import RenderedShot, RenderSettings
from kinema.pipelines.scenes.rendered.configured import artifact_shares, render_settings
from kinema.pipelines.scenes.rendered.motion import ThinPlate
from kinema.pipelines.scenes.rendered.statistics import distance, flow_shares, matched, rendered_shares

PLAIN = RenderSettings(height=192, width=256, num_textures=2, effects=EffectsConfig.none())


def warped(values, flow_px, how=cv2.INTER_LINEAR):
    """Values of frame 2 where frame 1's pixels go."""
    y, x = np.mgrid[: flow_px.shape[1], : flow_px.shape[2]].astype(np.float32)
    return cv2.remap(np.float32(values), x + flow_px[0], y + flow_px[1], how, borderMode=cv2.BORDER_REPLICATE)


def inner(shot, t0, t1, margin=2):
    """Visible pixels off the outlines, whose neighbours show the same layer in both frames."""
    flow, hidden = shot.motion(t0, t1)
    outlines = []
    for t in (t0, t1):
        labels = shot.object_ids(t)
        rim = cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
        outlines.append(cv2.dilate(rim.astype(np.uint8), np.ones((2 * margin + 1,) * 2, np.uint8)))
    y, x = np.mgrid[: flow.shape[1], : flow.shape[2]]
    x, y = x + flow[0], y + flow[1]
    inside = (x >= margin) & (y >= margin) & (x <= flow.shape[2] - 1 - margin) & (y <= flow.shape[1] - 1 - margin)
    return ~hidden & (outlines[0] == 0) & (warped(outlines[1], flow) == 0) & inside


@pytest.mark.parametrize("kind", ["affine", "homography", "thin_plate"])
def test_flow_warps_the_second_frame_onto_the_first(kind):
    shares = {"homography": float(kind == "homography"), "thin_plate": float(kind == "thin_plate")}
    settings = replace(PLAIN, **shares)
    for index in range(4):
        shot = RenderedShot(settings, 1, index)
        flow, use = shot.flow_px(0, 1), inner(shot, 0, 1)
        assert use.mean() > 0.3
        first, second = shot.frame(0).astype(np.float32), shot.frame(1)

        def error(moved_px, how=cv2.INTER_LINEAR, first=first, second=second, use=use):
            return np.abs(warped(second, moved_px, how) - first)[use].mean()

        # Grey levels. What is left is the rounding of two pictures to 8 bits (0.33) and the bilinear interpolation of
        # the second one, of which a better interpolation leaves less.
        assert error(flow) < 1.0
        assert error(flow, cv2.INTER_LANCZOS4) < error(flow)
        for x, y in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1)):  # a tenth of a pixel beside it is worse
            assert error(flow, cv2.INTER_LANCZOS4) < error(flow + np.float32([[[x]], [[y]]]), cv2.INTER_LANCZOS4)


def test_forward_and_backward_flow_undo_each_other():
    for index in range(3):
        shot = RenderedShot(replace(PLAIN, thin_plate=0.5, homography=0.5), 2, index)
        forward, backward = shot.flow_px(0, 1), shot.flow_px(1, 0)
        back = np.stack([warped(plane, forward) for plane in backward])
        apart = np.hypot(*(forward + back))[inner(shot, 0, 1)]
        assert np.percentile(apart, 99) < 0.02 and apart.mean() < 0.005


def test_tracks_agree_with_flow_and_are_hidden_where_it_is():
    shot = RenderedShot(replace(PLAIN, num_frames=5, thin_plate=0.5, homography=0.5), 3, 0)
    rng = np.random.default_rng(0)
    places = np.stack([rng.integers(0, 256, 300), rng.integers(0, 192, 300)], axis=1)
    points, visible = shot.tracks(places.astype(float), 1)
    assert np.abs(points[1] - places).max() < 0.01 and visible[1].all()
    for t in (0, 2, 4):
        flow, hidden = shot.motion(1, t)
        expected = places + flow[:, places[:, 1], places[:, 0]].T
        assert np.abs(points[t] - expected).max() < 0.05
        assert (visible[t] == ~hidden[places[:, 1], places[:, 0]]).mean() > 0.99


def test_occluded_pixels_are_those_that_nothing_of_the_other_frame_comes_from():
    shot = RenderedShot(PLAIN, 4, 1)
    flow, hidden = shot.motion(0, 1)
    labels, there = shot.object_ids(0), shot.object_ids(1)
    y, x = np.mgrid[:192, :256]
    tx, ty = np.floor(x + flow[0] + 0.5).astype(int), np.floor(y + flow[1] + 0.5).astype(int)
    outside = (tx < 0) | (ty < 0) | (tx >= 256) | (ty >= 192)
    covered = ~outside & (there[np.clip(ty, 0, 191), np.clip(tx, 0, 255)] > labels)
    assert (hidden == (outside | covered)).mean() > 0.999 and 0.001 < hidden.mean() < 0.5


def test_a_shot_is_a_function_of_its_arguments():
    settings = replace(PLAIN, effects=EffectsConfig(*[1.0] * 7))
    a, b, other = (RenderedShot(settings, 5, index) for index in (2, 2, 3))
    b.frame(1)  # whatever is asked for first
    assert np.array_equal(a.frame(0), b.frame(0)) and np.array_equal(a.motion(0, 1)[0], b.motion(0, 1)[0])
    assert not np.array_equal(a.frame(0), other.frame(0))
    assert np.array_equal(
        a.flow_px(0, 1), RenderedShot(replace(settings, effects=EffectsConfig.none()), 5, 2).flow_px(0, 1)
    )


@pytest.mark.parametrize("name", EffectsConfig.__dataclass_fields__)
def test_every_effect_changes_the_picture_and_not_the_flow(name):
    changed = 0
    for index in range(3):
        plain = RenderedShot(PLAIN, 6, index)
        with_effect = RenderedShot(replace(PLAIN, effects=replace(EffectsConfig.none(), **{name: 1.0})), 6, index)
        assert np.array_equal(plain.flow_px(0, 1), with_effect.flow_px(0, 1))
        changed += not np.array_equal(plain.frame(1), with_effect.frame(1))
    assert changed >= 2  # a shot that hardly moves has no motion blur


def test_bending_is_undone():
    rng = np.random.default_rng(0)
    for _ in range(5):
        plate = ThinPlate.draw(rng, (128, 96), 12.0)
        u = rng.uniform((-128, -96), (128, 96), (500, 2))
        v = plate.bend(u, 1.0)
        assert np.abs(v - u).max() > 1
        assert np.abs(plate.unbend(v, 1.0) - u).max() < 0.02


def test_textures_come_from_any_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    cv2.imwrite(str(tmp_path / "red.png"), np.full((40, 60, 3), (20, 20, 200), np.uint8))
    (tmp_path / "broken.jpg").write_bytes(rng.bytes(100))
    frame = RenderedShot(replace(PLAIN, textures=str(tmp_path)), 0, 0).frame(0)
    assert np.abs(frame.reshape(-1, 3).mean(0) - (200, 20, 20)).max() < 3
    (tmp_path / "bad").mkdir()
    (tmp_path / "broken.jpg").rename(tmp_path / "bad" / "broken.jpg")
    with pytest.raises(ValueError, match="none of 1 images can be decoded"):
        RenderedShot(replace(PLAIN, textures=str(tmp_path / "bad")), 0, 0).frame(0)
    with pytest.raises(ValueError, match="holds no image"):
        RenderedShot(replace(PLAIN, textures=str(tmp_path / "nothing")), 0, 0).frame(0)


def test_motion_is_matched_to_a_histogram():
    wanted = np.zeros(24)
    wanted[10:13] = (1, 2, 1)  # around 3 px a frame
    settings, before, after = matched(PLAIN, wanted, rounds=4, shots=12)
    assert after < 0.6 * before
    assert distance(rendered_shares(settings, shots=12), wanted) == pytest.approx(after)
    with pytest.raises(ValueError, match="no motion"):
        matched(PLAIN, np.zeros(24))
    constant = np.full((2, 8, 64), np.nan, np.float32)
    constant[:, :4] = np.array([3.0, 4.0])[:, None, None]  # 5 px of 64 is 40 px at the reference width
    assert flow_shares(constant)[17] == 4 * 64 and flow_shares(constant).sum() == 4 * 64


def test_dis_finds_rendered_flow_about_as_hard_as_sintels(shared_data):
    """Usual settings against two scenes of Sintel; errors of one order, hidden pixels among them."""
    errors = []
    for index in range(6):
        shot = RenderedShot(RenderSettings(num_textures=4), 0, index)
        first, second = (torch.from_numpy(shot.frame(t)).permute(2, 0, 1)[None].float() / 255 for t in (0, 1))
        errors.append((DIS()(first, second)[0] - torch.from_numpy(shot.flow_px(0, 1))).norm(dim=0).mean().item())
    sintel = evaluate_flow(DIS(), shared_data / "flow/sintel", "sintel")
    print(f"DIS: rendered {np.mean(errors):.3f} px, Sintel {sintel['clean_epe']:.3f} and {sintel['final_epe']:.3f} px")
    assert sintel["clean_epe"] / 4 < np.mean(errors) < 4 * sintel["clean_epe"]


def test_finer_textures_show_as_much_in_a_small_frame_and_move_alike():
    small = replace(PLAIN, height=64, width=96)
    edges = []
    for detail in (1.0, 4.0):
        settings = replace(small, detail=detail)
        edges.append([])
        for index in range(6):
            shot = RenderedShot(settings, 1, index)
            flow, use = shot.flow_px(0, 1), inner(shot, 0, 1)
            assert np.array_equal(flow, RenderedShot(small, 1, index).flow_px(0, 1))
            first, second = shot.frame(0).astype(np.float32), shot.frame(1)
            edges[-1].append(np.abs(np.diff(first, axis=1)).mean())
            if use.any():  # as at the usual size: no finer than a frame can carry
                assert np.abs(warped(second, flow, cv2.INTER_LANCZOS4) - first)[use].mean() < 1.0
    assert np.mean(edges[1]) > 1.5 * np.mean(edges[0])
    with pytest.raises(ValueError, match="rendered.detail"):
        load_stage("train", None, ["clips=rendered", "rendered.detail=0.5"])


def test_rendered_motion_is_matched_to_a_flow_artifact(tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    size = ["rendered.height=64", "rendered.width=80"]
    fast = [*size, "rendered.speed_px=30", "rendered.speed_spread=0.3", "rendered.count=6", f"out={tmp_path}/clips"]
    shard.run(load_stage("shard", None, ["layout=rendered", *fast]), report=lambda line: None)
    wanted = artifact_shares(Artifact.read(tmp_path / "flow/truth"))
    shots = [RenderedShot(render_settings(load_stage("shard", None, fast).rendered), 0, index) for index in range(6)]
    ways = [shot.flow_px(*way) for shot in shots for way in ((0, 1), (1, 0))]
    assert distance(wanted, sum(map(flow_shares, ways))) < 0.05  # flow is stored in steps of 1/64 px
    usual, found = (
        RenderedIndex.of(load_stage("train", None, ["clips=rendered", *size, *match]).rendered).settings
        for match in ([], [f"rendered.match={tmp_path}/flow/truth"])
    )
    assert distance(rendered_shares(found), wanted) < 0.5 * distance(rendered_shares(usual), wanted)
    with pytest.raises(ValueError, match="rendered.match"):
        RenderedIndex.of(replace(load_stage("train", None, size).rendered, match=str(tmp_path / "clips")))


def test_rendered_shots_become_shards_that_read_back(tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    settings = ["layout=rendered", f"out={tmp_path}/clips", "rendered.height=64", "rendered.width=80", "min_shards=2"]
    settings += ["rendered.num_frames=3", "rendered.tracks_grid=4"]
    quiet = {"report": lambda line: None}
    summary = shard.run(load_stage("shard", None, [*settings, "rendered.count=4"]), **quiet)
    assert (summary.clips, summary.pairs, summary.known_share) == (4, 16, 1.0)
    again = shard.run(load_stage("shard", None, [*settings, "rendered.count=5"]), **quiet)
    assert (again.new_clips, again.built_shards, again.clips) == (1, 1, 5)
    index = ClipIndex.open(tmp_path / "clips", tmp_path / "flow/truth", tracks_url=tmp_path / "tracks/truth")
    clip = next(c for c in map(index.clip, range(len(index))) if c.meta["labels"]["index"] == 3)
    shot = RenderedShot(RenderSettings(64, 80, 3), 0, 3)
    assert np.array_equal(clip.frames([0, 1, 2]), np.stack(list(shot.frames())))
    flow, hidden = shot.motion(2, 1)
    stored = clip.flow_pair(2, -1)
    assert np.abs(stored.flow_px - flow).max() <= 1 / 128 and np.array_equal(stored.occlusion, hidden)
    tracks = clip.tracks()
    points, visible = shot.tracks(tracks.queries[:, 1:], 0)
    assert np.abs(tracks.points_px - points).max() < 0.05 and np.array_equal(tracks.visible, visible)
    for kind in ("clips", "flow/truth", "tracks/truth"):
        assert Artifact.read(tmp_path / kind).verify() == []


def test_the_loader_renders_on_the_fly():
    index = RenderedIndex(replace(PLAIN, height=64, width=80), 0, 6)

    def read_sample(clip, rng):
        t, gap = clip.flow_pairs[int(rng.integers(len(clip.flow_pairs)))]
        pair = clip.flow_pair(t, gap)
        return {"images": clip.frames([t, t + gap]), "flow_px": pair.flow_px, "hidden": pair.occlusion}

    def batches():
        loader = Loader(index, read_sample, LoaderConfig(num_workers=0), batch_size=3, seed=1, rank=0, world_size=1)
        found = [batch for batch, _ in zip(iter(loader), range(2), strict=False)]
        loader.close()
        return found

    first, second = batches(), batches()
    assert sorted(key for batch in first for key in batch["key"]) == sorted(index.keys)
    assert all((a["flow_px"] == b["flow_px"]).all() and (a["images"] == b["images"]).all()
               for a, b in zip(first, second, strict=True))  # fmt: skip
