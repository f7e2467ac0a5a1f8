"""Tars, lists and masks as people have them."""

import gzip
import io
import json
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kinema.configs import ClipConfig, MasksConfig, ShardConfig
from kinema.pipelines.artifacts import Artifact, read_range
from kinema.pipelines.shard import run
from kinema.pipelines.shard.sources import find_sources
from kinema.pipelines.video.errors import Corrupt
from kinema.pipelines.video.masks import parse_palette, read_masks

sys.path.insert(0, str(Path(__file__).parent))
from made_videos import numbered
from test_shard_sources import lay_out, numbers, picture, write_tar
from test_shard_stage import samples


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> bytes:
    return numbered(tmp_path_factory.mktemp("video") / "v.mp4", 6).read_bytes()


def test_packed_tars_are_read_like_plain_ones(tmp_path, video):
    plain = write_tar(tmp_path / "a.tar", {"x/k.mp4": video, "x/k.json": b'{"n": 1}', "k2.mp4": video})
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "c.tar").write_bytes(gzip.compress(plain.read_bytes()))  # as downloads are called
    found = find_sources(str(tmp_path))
    assert found.missing == {} and len(found.sources) == 6
    for source in found.sources:
        assert numbers(source) == list(range(6))
    assert [s.labels for s in found.sources if s.id.endswith("x/k.mp4")] == [{"n": 1}] * 3
    packed = (tmp_path / "b.tar.gz").read_bytes()
    (tmp_path / "d.tgz").write_bytes(packed[: len(packed) // 2])
    assert find_sources(str(tmp_path)).classes == {"d.tgz": "Truncated"}


def test_links_inside_of_a_tar_are_followed(tmp_path, video):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("v/one.mp4")
        info.size = len(video)
        tar.addfile(info, io.BytesIO(video))
        for name, kind, target in (
            ("w/hard.mp4", tarfile.LNKTYPE, "v/one.mp4"),
            ("v/soft.mp4", tarfile.SYMTYPE, "one.mp4"),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    found = find_sources(str(tmp_path / "a.tar"))
    assert [source.id for source in found.sources] == ["a.tar/v/one.mp4", "a.tar/v/soft.mp4", "a.tar/w/hard.mp4"]
    assert all(numbers(source) == list(range(6)) for source in found.sources)


def test_labels_of_samples_with_dots_in_their_names(tmp_path, video):
    members = {
        "s.left.mp4": video,
        "s.right.mp4": video,
        "s.right.json": b'{"side": "right"}',
        "s.info.json": b'{"place": "here"}',
        "s.cls": b"4",
        "s.txt": "caf\u00e9 ".encode(),
    }
    labels = {s.id: s.labels for s in find_sources(str(write_tar(tmp_path / "a.tar", members))).sources}
    shared = {"place": "here", "cls": 4, "txt": "caf\u00e9"}
    assert labels == {"a.tar/s.left.mp4": shared, "a.tar/s.right.mp4": {"side": "right", **shared}}


def test_listing_a_tar_takes_time_in_proportion_to_its_members(tmp_path):
    def seconds(count: int) -> float:
        path = write_tar(
            tmp_path / f"{count}.tar", {f"{i:06d}.{e}": b"{}" for i in range(count) for e in ("mp4", "json")}
        )
        started = time.process_time()
        assert len(find_sources(str(path)).sources) == count
        return time.process_time() - started

    seconds(50)
    assert seconds(4000) < 30 * max(seconds(400), 0.02)


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("a.csv", "v/a.mp4,run\nv/b.mp4,jump\n", ["run", "jump"]),
        ("b.csv", "0;v/a.mp4\n1;v/b.mp4\n", [0, 1]),
        ("c.csv", "\ufeffcaption\tpath\nrun\tv/a.mp4\njump\tv/b.mp4\n", None),
        ("d.txt", "v/a.mp4\t0\nv/b.mp4\t1\n", [0, 1]),
        ("e.txt", "v/a.mp4,0\nv/b.mp4,1\nv/gone.mp4,1\n", [0, 1]),
        ("f.txt", '"v/a.mp4" 0 7\n"v/b.mp4" 1 7\n', [[0, 7], [1, 7]]),
        ("g.jsonl", '{"video": "v/a.mp4", "label": 0}\nnonsense\n{"video": "v/b.mp4", "label": NaN}\n', [0, None]),
        ("h.json", '[{"path": "v/a.mp4", "label": 2}, {"path": "v/b.mp4", "label": 3}]', [2, 3]),
        ("i.csv", "name,label\nv/a.mp4,0\nv/b.mp4,1\n", ["0", "1"]),
        ("j.json", '{"v/a.mp4": {"label": 2}, "v/b.mp4": 3}', [2, 3]),
        ("k.json", '{"licence": "x", "clips": [{"file": "v/a.mp4"}, {"file": "v/b.mp4", "label": 1}]}', [None, 1]),
        ("l.txt", "ffconcat version 1.0\nfile 'v/a.mp4'\nduration 2\nfile v/b.mp4\n", [None, None]),
        ("m.txt", "v\\a.mp4 4\nv\\b.mp4 5\n", [4, 5]),
    ],
)
def test_lists_in_the_forms_people_use(tmp_path, video, name, text, expected):
    lay_out(tmp_path / "elsewhere", {"v/a.mp4": video, "v/b.mp4": video})
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = find_sources(str(tmp_path / name), root=str(tmp_path / "elsewhere"))
    assert [source.id for source in found.sources] == ["v/a.mp4", "v/b.mp4"]
    labels = [source.labels for source in found.sources]
    if expected is None:
        assert labels == [{"caption": "run"}, {"caption": "jump"}]
    else:  # null is no label
        assert labels == [None if e is None else {"label": e} for e in expected]
    assert len(found.missing) == (1 if name[0] in "eg" else 0)


def test_when_nothing_matches_one_line_says_how_the_list_was_read(tmp_path):
    for name, text in (
        ("a.txt", "x/a.mp4 0\nx/b.mp4 1\n"),
        ("b.csv", "path,label\nx/a.mp4,0\n"),
        ("c.csv", "x/a.mp4,0\n"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="first line: '") as caught:
            find_sources(str(tmp_path / name))
        assert "root=" in str(caught.value) and "\n" not in str(caught.value)
        assert text.splitlines()[0] in str(caught.value)


def test_start_and_end_cut_a_part(tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    for name, options in (("a.mp4", {"g": "10"}), ("b.ts", {"g": "10"})):
        numbered(tmp_path / name, 96, options=options)
    rows = "a.mp4,1,2.5,one\na.mp4,00:00:03,,two\nb.ts,1,2.5,three\nb.ts,5,4,wrong\n"
    (tmp_path / "m.csv").write_text(f"path,start,end,caption\n{rows}")
    clip = ClipConfig(preset="ultrafast", crf=10, cuts="none")
    config = ShardConfig(videos=str(tmp_path / "m.csv"), out=str(tmp_path / "out"), clip=clip, min_shards=1)
    run(config, report=lambda _: None)
    artifact = Artifact.read(str(tmp_path / "out"))
    assert {row["source"]: (row["numbers"], json.loads(row["labels"])) for row in samples(tmp_path / "out")} == {
        "a.mp4#1-2.5": (list(range(24, 60)), {"caption": "one"}),
        "a.mp4#3-": (list(range(72, 96)), {"caption": "two"}),
        "b.ts#1-2.5": (list(range(24, 60)), {"caption": "three"}),
    }
    (wrong,) = artifact.quarantined().to_pylist()
    assert "does not lie behind its start" in wrong["message"]


def png(array: np.ndarray) -> bytes:
    target = io.BytesIO()
    Image.fromarray(array).save(target, "PNG")
    return target.getvalue()


def test_masks_by_their_colours():
    rgb = np.zeros((4, 6, 3), np.uint8)
    rgb[:2], rgb[2, :3] = (0, 0, 128), (224, 224, 192)  # label 4 and void of VOC
    grey = np.repeat(np.arange(24, dtype=np.uint8).reshape(4, 6)[..., None], 3, 2)
    orange = np.zeros((4, 6, 3), np.uint8)
    orange[1] = (255, 128, 0)
    deep = np.zeros((4, 6), np.uint16)
    deep[1] = 300
    files = {"rgb": png(rgb), "grey": png(grey), "orange": png(orange), "deep": png(deep)}

    def read(name: str, palette=()):
        return read_masks([name], (6, 4), (0, 0), files.__getitem__, parse_palette(palette))[0][0]

    assert np.unique(read("rgb")).tolist() == [0, 4, 255]
    np.testing.assert_array_equal(read("grey"), grey[..., 0])
    for name, unknown, palette in (
        ("orange", "ff8000", ["000000=0", "ff8000=3"]),
        ("deep", "id300", ["id0=0", "id300=3"]),
    ):
        with pytest.raises(Corrupt, match=rf"{unknown}.*masks\.palette="):
            read(name)
        assert np.unique(read(name, palette)).tolist() == [0, 3]
    with pytest.raises(ValueError, match="masks.palette=red=1"):
        parse_palette(["red=1"])


def test_masks_of_unknown_colours_quarantine_their_source(tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    strange = np.zeros((96, 128, 3), np.uint8)
    strange[:9] = (10, 20, 30)
    files = {f"JPEGImages/x/{i}.png": picture(i) for i in range(3)}
    lay_out(tmp_path / "d", files | {f"Annotations/x/{i}.png": png(strange) for i in range(3)})
    clip = ClipConfig(preset="ultrafast")
    run(ShardConfig(videos=str(tmp_path / "d"), out=str(tmp_path / "o"), clip=clip), report=lambda _: None)
    (row,) = pq.read_table(tmp_path / "o" / "quarantine.parquet").to_pylist()
    assert row["error_class"] == "Corrupt" and "0a141e" in row["message"]
    masks = MasksConfig(palette=("000000=0", "0a141e=5"))
    config = ShardConfig(videos=str(tmp_path / "d"), out=str(tmp_path / "p"), clip=clip, masks=masks)
    run(config, report=lambda _: None)
    artifact = Artifact.read(str(tmp_path / "p"))
    (sample,) = artifact.samples().to_pylist()
    data = read_range(artifact.shard_url(sample["shard"]), sample["masks_offset"], sample["masks_size"])
    assert np.unique(np.load(io.BytesIO(data))["masks"]).tolist() == [0, 5]
