"""The page that people look at."""

import base64
import io
import re

import av
import numpy as np
from PIL import Image

from kinema.configs import TeachConfig, TrackConfig
from kinema.pipelines import teach, track
from kinema.pipelines.report import Page
from kinema.pipelines.report.inspect import inspect
from kinema.pipelines.report.sections import ranked_pairs
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips


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
