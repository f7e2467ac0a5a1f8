"""What `videos=` may be, and what is said when it holds nothing usable."""

import io
import json
import os
import sys
import tarfile
from fractions import Fraction
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kinema.configs import ClipConfig
from kinema.pipelines.shard.media import Source, content_hash, open_source
from kinema.pipelines.shard.scan import scan_source
from kinema.pipelines.shard.sources import find_sources
from kinema.pipelines.video.errors import Missing
from kinema.pipelines.video.packets import to_rgb

sys.path.insert(0, str(Path(__file__).parent))
from made_videos import encode, number_of, numbered, paint


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> bytes:
    return numbered(tmp_path_factory.mktemp("video") / "v.mp4", 4).read_bytes()


def lay_out(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def numbers(source: Source) -> list[int]:
    with open_source(source, 24.0) as opened:
        return [number_of(to_rgb(frame)) for frame in opened.frames()]


def test_folder_is_searched_deeply_and_other_files_are_counted(tmp_path, video):
    names = {
        "b/c.MP4": video,
        "a.mov": video,
        "b/notes.txt": b"x",
        ".hidden/d.mp4": video,
        "._a.mov": b"",
        "x.jpg": b"",
    }
    found = find_sources(str(lay_out(tmp_path, names)))
    assert [source.id for source in found.sources] == ["a.mov", "b/c.MP4"]
    assert found.ignored_files == 2
    assert numbers(found.sources[1]) == [0, 1, 2, 3]


def test_the_ids_do_not_depend_on_where_the_folder_lies(tmp_path, video):
    for place in ("one", "two/three"):
        found = find_sources(str(lay_out(tmp_path / place, {"s/a.mp4": video, "t/a.mp4": video})))
        assert [source.id for source in found.sources] == ["s/a.mp4", "t/a.mp4"]


def test_the_output_folder_is_left_alone(tmp_path, video):
    lay_out(tmp_path, {"a.mp4": video, "clips/clips-12345678-000000.tar": b"", "clips/b.mp4": video})
    found = find_sources(str(tmp_path), exclude=str(tmp_path / "clips"))
    assert [source.id for source in found.sources] == ["a.mp4"]


def test_one_file(tmp_path, video):
    found = find_sources(str(lay_out(tmp_path, {"a b:c%03d.mp4": video}) / "a b:c%03d.mp4"))
    assert [source.id for source in found.sources] == ["a b:c%03d.mp4"]
    assert numbers(found.sources[0]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("*.mp4", ["x.mp4"]),
        ("s*/a.*", ["s/a.mkv", "s/a.mp4"]),
        ("**/*.mkv", ["s/a.mkv"]),
        ("[st]", ["s/a.mkv", "s/a.mp4", "t/q.mp4"]),
    ],
)
def test_glob(tmp_path, video, pattern, expected):
    lay_out(tmp_path, dict.fromkeys(("x.mp4", "s/a.mp4", "s/a.mkv", "t/q.mp4"), video))
    assert [s.id for s in find_sources(f"{tmp_path}/{pattern}").sources] == expected


def test_a_folder_whose_name_has_brackets_is_a_folder(tmp_path, video):
    folder = lay_out(tmp_path / "take [1]", {"a.mp4": video})
    assert [s.id for s in find_sources(str(folder)).sources] == ["a.mp4"]


def test_list_names_files_relative_to_itself_and_tells_missing_ones(tmp_path, video):
    lay_out(tmp_path, {"data/s/a.mp4": video, "data/b.mp4": video, "elsewhere/c.mp4": video})
    lines = f"# comment\ns/a.mp4\n\nb.mp4\n./b.mp4\ngone.mp4\n{tmp_path}/elsewhere/c.mp4\n"
    (tmp_path / "data" / "list.txt").write_text(lines)
    found = find_sources(str(tmp_path / "data" / "list.txt"))
    assert [source.id for source in found.sources] == ["b.mp4", "c.mp4", "s/a.mp4"]
    assert found.missing == {"gone.mp4": "listed, but there is no such file"}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_manifest_columns_become_labels(tmp_path, video, kind):
    lay_out(tmp_path, {"v/a.mp4": video, "v/b.mp4": video})
    rows = [
        {"Video": "v/a.mp4", "caption": "a cat, running", "label": "7"},
        {"Video": "v/b.mp4", "caption": "", "label": "9"},
        {"Video": "v/none.mp4", "caption": "x", "label": "1"},
    ]
    path = tmp_path / f"m.{kind}"
    if kind == "csv":
        path.write_text('Video,caption,label\nv/a.mp4,"a cat, running",7\nv/b.mp4,,9\nv/none.mp4,x,1\n')
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    found = find_sources(str(path))
    assert {s.id: s.labels for s in found.sources} == {
        "v/a.mp4": {"caption": "a cat, running", "label": "7"},
        "v/b.mp4": {"label": "9"},
    }
    assert list(found.missing) == ["v/none.mp4"]


def test_parquet_labels_keep_their_types(tmp_path, video):
    lay_out(tmp_path, {"a.mp4": video})
    table = pa.table({"path": ["a.mp4"], "n": [3], "x": [0.5], "tags": [["u", "v"]], "box": [{"w": 2}], "ok": [True]})
    pq.write_table(table, tmp_path / "m.parquet")
    labels = find_sources(str(tmp_path / "m.parquet")).sources[0].labels
    assert labels == {"n": 3, "x": 0.5, "tags": ["u", "v"], "box": {"w": 2}, "ok": True}
    assert json.loads(json.dumps(labels)) == labels


def test_a_file_listed_twice_keeps_both_rows(tmp_path, video):
    lay_out(tmp_path, {"a.mp4": video})
    (tmp_path / "m.csv").write_text("path,caption\na.mp4,one\na.mp4,two\n")
    found = find_sources(str(tmp_path / "m.csv"))
    assert [s.labels for s in found.sources] == [{"rows": [{"caption": "one"}, {"caption": "two"}]}]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tars_with_labels_and_dots_in_keys(tmp_path, video):
    other = numbered(tmp_path / "other" / "v.mkv", 6, seed=2).read_bytes()
    write_tar(
        tmp_path / "s-000.tar",
        {
            "vid.001.json": b'{"caption": "one"}',
            "vid.001.mp4": video,
            "vid.002.mkv": other,
            "vid.002.txt": b"two ",
            "d/k.cls": b"12",
            "d/k.mp4": video,
            "readme": b"x",
        },
    )
    found = find_sources(str(tmp_path / "s-000.tar"))
    assert {s.id: s.labels for s in found.sources} == {
        "s-000.tar/vid.001.mp4": {"caption": "one"},
        "s-000.tar/vid.002.mkv": {"txt": "two"},
        "s-000.tar/d/k.mp4": {"cls": 12},
    }
    by_id = {source.id: source for source in found.sources}
    assert numbers(by_id["s-000.tar/vid.001.mp4"]) == [0, 1, 2, 3]
    assert numbers(by_id["s-000.tar/vid.002.mkv"]) == list(range(6))
    (tmp_path / "same.mp4").write_bytes(video)
    assert content_hash(by_id["s-000.tar/d/k.mp4"]) == content_hash(Source("x", str(tmp_path / "same.mp4")))


def test_a_broken_tar_is_told_and_the_others_are_used(tmp_path, video):
    write_tar(tmp_path / "good.tar", {"a.mp4": video})
    (tmp_path / "bad.tar").write_bytes(b"not a tar" * 200)
    found = find_sources(str(tmp_path), layout="webdataset")
    assert [s.id for s in found.sources] == ["good.tar/a.mp4"]
    assert "bad.tar" in found.missing


def picture(number: int) -> bytes:
    target = io.BytesIO()
    Image.fromarray(paint(number)).save(target, "PNG")
    return target.getvalue()


def mask(value: int) -> bytes:
    image = Image.fromarray(np.full((96, 128), value, np.uint8), "P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    target = io.BytesIO()
    image.save(target, "PNG")
    return target.getvalue()


def test_davis_and_youtube_vos_layouts(tmp_path):
    files = {f"JPEGImages/480p/car/{i:05d}.png": picture(i) for i in range(6)}
    files |= {f"Annotations/480p/car/{i:05d}.png": mask(1) for i in (0, 5)}
    files |= {f"JPEGImages/480p/no_masks/{i}.png": picture(i) for i in range(11)}
    files |= {"ImageSets/2017/train.txt": b"car\n"}
    for start in ("", "JPEGImages", "JPEGImages/480p"):
        found = find_sources(str(lay_out(tmp_path, files) / start))
        car, bare = found.sources
        assert car.id.endswith("car") and bare.id.endswith("no_masks")
        assert [path is not None for path in car.masks] == [True, False, False, False, False, True]
        assert bare.masks == ()
        assert numbers(car) == list(range(6))
        assert numbers(bare) == list(range(11)), "10 comes after 9"


def test_a_plain_folder_of_pictures(tmp_path):
    lay_out(tmp_path / "seq", {f"{i}.png": picture(i) for i in range(3)})
    found = find_sources(str(tmp_path / "seq"))
    assert [source.id for source in found.sources] == ["seq"]
    assert numbers(found.sources[0]) == [0, 1, 2]


def test_a_bucket(video):
    memory = fsspec.filesystem("memory")
    for name in ("bucket/v/s/a.mp4", "bucket/v/b.mp4"):
        memory.pipe_file(f"/{name}", video)
    memory.pipe_file("/bucket/v/m.csv", b"path,caption\ns/a.mp4,hello\n")
    found = find_sources("memory://bucket/v")
    assert [source.id for source in found.sources] == ["b.mp4", "s/a.mp4"] and found.ignored_files == 1
    assert numbers(found.sources[1]) == [0, 1, 2, 3]
    assert [s.id for s in find_sources("memory://bucket/v/*.mp4").sources] == ["b.mp4"]
    manifest = find_sources("memory://bucket/v/m.csv")
    assert [(s.id, s.labels) for s in manifest.sources] == [("s/a.mp4", {"caption": "hello"})]
    assert numbers(manifest.sources[0]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "files, videos, message",
    [
        ({}, ".", r"no video found .*it is empty"),
        ({"a.txt": b"", "b.txt": b"", "c.json": b""}, ".", r"3 files: 2 x \.txt, 1 x \.json.*\.mp4"),
        ({"a.mp4": b""}, "*.mkv", "none matches"),
        ({}, "nowhere", "nowhere does not exist"),
        ({"m.csv": b"name,label\na.mp4,1\n"}, "m.csv", r"no path column \(its columns: name, label\).*path, video"),
        ({"m.csv": b""}, "m.csv", "no path column"),
        ({"m.parquet": b"junk"}, "m.parquet", "cannot be read"),
        ({"a.doc": b"x"}, "a.doc", "one file of another kind"),
        ({"list.txt": b"# nothing\n"}, "list.txt", "no video found"),
    ],
)
def test_nothing_usable_is_one_clear_line(tmp_path, files, videos, message):
    lay_out(tmp_path, files)
    with pytest.raises(ValueError, match=message) as caught:
        find_sources(str(tmp_path / videos) if videos != "." else str(tmp_path))
    assert "\n" not in str(caught.value)


def test_empty_and_unknown_settings():
    with pytest.raises(ValueError, match="videos= is empty"):
        find_sources("")
    with pytest.raises(ValueError, match="layout=tars is not known"):
        find_sources("x", layout="tars")


def test_pipes_and_broken_links_do_not_block(tmp_path, video):
    lay_out(tmp_path, {"a.mp4": video})
    os.mkfifo(tmp_path / "b.mp4")
    (tmp_path / "c.mp4").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [source.id for source in find_sources(str(tmp_path)).sources] == ["a.mp4"]


def test_a_file_that_vanishes_is_missing(tmp_path):
    with pytest.raises(Missing, match="cannot be read"):
        content_hash(Source("a.mp4", str(tmp_path / "a.mp4")))


def test_a_name_that_is_not_utf8_is_told(tmp_path, video):
    lay_out(tmp_path, {"a.mp4": video})
    with open(os.fsencode(tmp_path) + b"/b\xff.mp4", "wb") as file:
        file.write(video)
    found = find_sources(str(tmp_path))
    assert [source.id for source in found.sources] == ["a.mp4"]
    assert found.missing == {"b\\udcff.mp4": "the file's name is not UTF-8; rename it"}


@pytest.mark.parametrize("fps, error", [(Fraction(47105, 2), "TooShort"), (Fraction(1000), "")])
def test_a_clock_that_makes_clips_of_less_than_two_milliseconds_is_named(tmp_path, fps, error):
    """A damaged time base; the 21 frames of a camera of 1000 frames per second are a clip."""
    path = tmp_path / "quick.mp4"
    path.write_bytes(encode([paint(i, shift=i) for i in range(21)], fps=fps))
    scan = scan_source(Source("quick.mp4", str(path)), ClipConfig(), 24.0)
    assert scan.error_class == error
    if error:
        assert scan.message.startswith(
            "21 frames at 23552.5 frames per second last 0.9 ms, and a clip cannot be shorter"
        )
