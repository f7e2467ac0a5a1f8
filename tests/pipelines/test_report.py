"""The page that people look at."""

import base64
import io
import re

import av
import numpy as np
import pytest
from PIL import Image

from kinema.configs import TeachConfig, TrackConfig
from kinema.pipelines import teach, track
from kinema.pipelines.loader import ClipIndex
from kinema.pipelines.report import Page, teachers
from kinema.pipelines.report.inspect import inspect, inspect_teachers
from kinema.pipelines.report.sections import ranked_pairs
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow
from kinema.pipelines.teach.cost import PairCost


def test_page_holds_its_pictures_and_escapes_text(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    page = Page("<b>title</b>", "lead & more")
    page.section("Section")
    page.pictures([(picture, 'a "caption"')])
    page.table([{"source": "<script>.mp4", "count": 12345, "share": 0.123456}])
    page.table([])
    page.line_chart({"loss": ([0, 1, 2], [3.0, 2.0, 1.0])}, "step", "loss")
    page.histogram([1.0, 2.0, float("nan")], "motion")
    path = page.write(tmp_path / "sub" / "page.html")
    text = path.read_text()
    assert "<script>" not in text and "&lt;script&gt;.mp4" in text
    assert "12,345" in text and "0.1235" in text and "none" in text
    assert text.count("<svg") == 2
    shown = base64.b64decode(re.search(r"base64,([^\"]+)", text)[1])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(shown))), picture)
    assert "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert not list(path.parent.glob("*.tmp"))


def pair(key, consistency_px, gap=1, static=False):
    signals = {"pair_t": 0, "pair_gap": gap, "pair_static": static, "pair_photometric": 0.1}
    return {"key": key, "pair_consistency_px": consistency_px, **signals}


def test_best_and_worst_pairs_are_forward_moving_and_of_different_clips():
    pairs = [pair("a", 0.1), pair("a", 0.2), pair("b", 5.0), pair("c", None), pair("d", 0.3, static=True)]
    pairs += [pair("e", 0.0, gap=-1), pair("f", 1.0)]
    best, worst = ranked_pairs(pairs, 2).values()
    assert [(p["key"], p["pair_consistency_px"]) for p in best] == [("a", 0.1), ("f", 1.0)]
    assert [p["key"] for p in worst] == ["c", "b"]


def test_page_about_flow_has_histograms_and_pictures_of_pairs(tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    write_scene_clips([Scene(seed=s, height=64, width=96, num_frames=3) for s in range(2)], tmp_path / "clips")
    teach.run(TeachConfig(clips=str(tmp_path / "clips"), gaps=(1,)))
    summary = inspect(str(tmp_path / "flow" / "dis"))
    text = open(summary.page).read()
    assert summary.kind == "flow" and text.count("<svg") == 4
    assert "Best pairs" in text and "Worst pairs" in text and "photometric error" in text
    assert text.count("difference after warping") >= 4
    track.run(TrackConfig(clips=str(tmp_path / "clips"), flow=str(tmp_path / "flow" / "dis"), grid=4))
    found = inspect(str(tmp_path / "tracks" / "chain"), pictures=str(tmp_path / "pictures"))
    film = open(found.page).read()
    assert found.files == len(list((tmp_path / "pictures").glob("*.mp4"))) == 2
    mp4 = base64.b64decode(re.search(r"video/mp4;base64,([^\"]+)", film)[1])
    with av.open(io.BytesIO(mp4)) as container:
        decoded = list(container.decode(video=0))
    assert (len(decoded), decoded[0].height, decoded[0].width) == (3, 64, 96)
    (tmp_path / "clips").rename(tmp_path / "renamed")
    assert "no pictures" not in open(inspect(str(tmp_path / "flow" / "dis")).page).read()
    (tmp_path / "far").mkdir()
    (tmp_path / "renamed").rename(tmp_path / "far" / "clips")
    assert "no pictures" in open(inspect(str(tmp_path / "flow" / "dis")).page).read()


def test_teachers_side_by_side_on_one_page(tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    scenes = [Scene(seed=s, height=64, width=96, num_frames=3) for s in range(2)]
    clips = write_scene_clips(scenes, tmp_path / "clips")
    write_scene_flow(scenes, clips, tmp_path / "flow" / "truth", gaps=(1, -1))
    targets = [str(tmp_path / "flow" / name) for name in ("usual", "coarse")]
    for target, preset in zip(targets, (0, 1), strict=True):
        teach.run(TeachConfig(clips=str(tmp_path / "clips"), out=target, iters=preset, gaps=(1,)))
    measured = []
    monkeypatch.setattr(teachers, "pair_cost", lambda *asked: measured.append(asked) or PairCost(0.25, 0.5))
    summary = inspect_teachers(targets, pictures=str(tmp_path / "pictures"), truth=str(tmp_path / "flow" / "truth"))
    assert measured == [("dis", 64, 96, 0), ("dis", 64, 96, 1)]
    text = open(summary.page).read()
    assert summary.kind == "teachers" and "Which to take" in text and "true motion" in text
    # The wheel, and of four pairs: both frames, two flows, disagreement, true motion, two errors.
    assert summary.files == 1 + 4 * 8
    index = ClipIndex.open(tmp_path / "clips", targets[0])
    truth = {f"scene-{scene.seed}": scene for scene in scenes}
    errors = [
        np.hypot(*(clip.flow(t, gap) - truth[clip.row["source"]].motion(t, t + gap)[0])).mean()
        for clip in (index.clip(i) for i in range(len(index)))
        for t, gap in clip.flow_pairs
    ]
    assert float(re.search(r"error, px: usual ([\d.]+)", text)[1]) == pytest.approx(np.mean(errors), abs=0.02)
    monkeypatch.setattr(teachers, "pair_cost", lambda *asked: None)
    without = open(inspect_teachers(targets, out=str(tmp_path / "blind.html")).page).read()
    assert "no true motion is known" in without and "true motion</figcaption>" not in without
    with pytest.raises(ValueError, match="no pair of frames in common"):
        teach.run(TeachConfig(clips=str(tmp_path / "clips"), out=str(tmp_path / "flow" / "far"), gaps=(2,)))
        inspect_teachers([targets[0], str(tmp_path / "flow" / "far")])


def test_heat_goes_from_black_over_red_to_white():
    heat = teachers.heat_picture(np.array([[0.0, 1.0, 2.0, 3.0]], np.float32), 3.0)
    assert heat[0].tolist() == [[0, 0, 0], [255, 0, 0], [255, 255, 0], [255, 255, 255]]
