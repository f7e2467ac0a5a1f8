"""Artifacts: deterministic shards, commits that survive kills, and a verify that finds every change."""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest

from kinema.pipelines.artifacts import Artifact, read_range, sample_key
from kinema.pipelines.artifacts import store as store_module
from kinema.pipelines.errors import StageError

CONFIG = {"clip": {"fps": 12.0, "gop": 12}, "crf": 18}


def plan_table(shards: dict[int, list[str]]) -> pa.Table:
    rows = [{"shard": s, "key": sample_key(name), "source": name} for s, names in shards.items() for name in names]
    return pa.Table.from_pylist(
        rows, schema=pa.schema([("shard", pa.int32()), ("key", pa.string()), ("source", pa.string())])
    )


def payloads(source: str, key: str | None = None) -> dict[str, bytes]:
    body = source.encode() * (37 * len(source) + 1)
    return {"mp4": body, "json": b'{"key":"%s"}' % (key or sample_key(source)).encode()}


def build(artifact: Artifact, shard: int, skip: tuple[str, ...] = ()) -> None:
    with artifact.shard_writer(shard) as writer:
        for row in artifact.plan_of(shard).to_pylist():
            if row["source"] in skip:
                writer.quarantine(row["key"], stage="test", error_class="ValueError", message="bad\nfile")
            else:
                members = payloads(row["source"], row["key"])
                writer.add(row["key"], members, row={"source": row["source"], "score": 0.5})
        writer.commit(input_hashes={"in": "ab"})


def make(url: str, shards: dict[int, list[str]], skip: tuple[str, ...] = ()) -> Artifact:
    artifact = Artifact.open(url, kind="clips", config=CONFIG)
    artifact.append_plan(plan_table(shards))
    for shard in artifact.pending():
        build(artifact, shard, skip)
    artifact.finalize()
    return artifact


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


SHARDS = {0: ["a.mp4", "b.mp4"], 1: ["c.mp4"], 2: ["d/e.mp4", "f.mp4", "g.mp4"]}


@pytest.fixture(params=["local", "object store"])
def url(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path / "clips")
        return
    import fsspec

    yield f"memory://bucket-{tmp_path.name}/clips"
    fsspec.filesystem("memory").store.clear()


def test_samples_are_read_back_by_one_ranged_read(url):
    artifact = make(url, SHARDS)
    again = Artifact.read(url)
    rows = again.samples().to_pylist()
    assert [(r["shard"], r["position"], r["source"]) for r in rows] == [
        (0, 0, "a.mp4"),
        (0, 1, "b.mp4"),
        (1, 0, "c.mp4"),
        (2, 0, "d/e.mp4"),
        (2, 1, "f.mp4"),
        (2, 2, "g.mp4"),
    ]
    for row in rows:
        data = read_range(again.shard_url(row["shard"]), row["mp4_offset"], row["mp4_size"])
        assert data == payloads(row["source"])["mp4"]
    assert again.verify() == []
    assert artifact.pending() == []
    assert again.manifest_hash() == artifact.manifest_hash()


def test_shards_are_plain_tars_without_clocks_or_owners(tmp_path):
    artifact = make(str(tmp_path / "clips"), SHARDS)
    with tarfile.open(artifact.shard_url(0)) as tar:
        names = [m.name for m in tar.getmembers()]
        assert names == [f"{sample_key(s)}.{e}" for s in ("a.mp4", "b.mp4") for e in ("json", "mp4")]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_shards_are_read_by_webdataset(tmp_path):
    import webdataset

    artifact = make(str(tmp_path / "clips"), SHARDS)
    urls = [artifact.shard_url(s) for s in SHARDS]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [s["__key__"] for s in samples] == [sample_key(n) for names in SHARDS.values() for n in names]
    assert samples[2]["mp4"] == payloads("c.mp4")["mp4"]


def test_equal_input_gives_equal_bytes(tmp_path):
    make(str(tmp_path / "one"), SHARDS, skip=("f.mp4",))
    make(str(tmp_path / "two"), SHARDS, skip=("f.mp4",))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_names_differ_between_artifacts_of_other_videos(tmp_path):
    one = make(str(tmp_path / "one"), {0: ["a.mp4"]})
    two = make(str(tmp_path / "two"), {0: ["b.mp4"]})
    assert one.shard_name(0) != two.shard_name(0)


def test_new_sources_leave_existing_shards_alone(url):
    artifact = make(url, SHARDS)
    before = {s: read_range(artifact.shard_url(s), 0, artifact.commits()[s]["bytes"]) for s in SHARDS}
    more = Artifact.open(url, kind="clips", config=CONFIG)
    whole = pa.concat_tables([more.plan, plan_table({3: ["new.mp4"]})])
    more.append_plan(whole)
    assert more.pending() == [3]
    build(more, 3)
    more.finalize()
    after = {s: read_range(more.shard_url(s), 0, more.commits()[s]["bytes"]) for s in SHARDS}
    assert after == before
    assert more.verify() == []
    assert more.samples().num_rows == 7


def test_another_config_is_refused_with_both_hashes(url):
    first = make(url, SHARDS)
    with pytest.raises(ValueError, match=r"another config.*clip\.fps was 12\.0, is 24\.0") as error:
        Artifact.open(url, kind="clips", config={**CONFIG, "clip": {"fps": 24.0, "gop": 12}})
    assert first.config_hash[:12] in str(error.value)
    with pytest.raises(ValueError, match="another input: clips was None, is 1234"):
        Artifact.open(url, kind="clips", config=CONFIG, inputs={"clips": "1234"})
    with pytest.raises(ValueError, match="holds clips, not flow"):
        Artifact.open(url, kind="flow", config=CONFIG)


def test_missing_or_unfinished_artifacts_say_what_is_missing(url):
    with pytest.raises(ValueError, match="holds no artifact"):
        Artifact.read(url)
    artifact = Artifact.open(url, kind="clips", config=CONFIG)
    with pytest.raises(ValueError, match="no commits yet: run `kinema shard`"):
        Artifact.read(url).samples()
    artifact.append_plan(plan_table(SHARDS))
    build(artifact, 1)
    with pytest.raises(ValueError, match="1 of 3 shards are committed: run `kinema shard`"):
        Artifact.read(url).samples()


def test_a_file_in_the_way_and_damaged_tables_are_named(tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match="film.mp4 holds no artifact"):
        Artifact.read(tmp_path / "film.mp4")
    with pytest.raises(ValueError, match="film.mp4 cannot be written: .*choose another out="):
        Artifact.open(tmp_path / "film.mp4", kind="clips", config=CONFIG)
    make(str(tmp_path / "clips"), SHARDS)
    for name in ("samples.parquet", "_plan.parquet"):
        path = tmp_path / "clips" / name
        good = path.read_bytes()
        path.write_bytes(good[: len(good) // 2])
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            artifact = Artifact.read(tmp_path / "clips")
            artifact.samples()
            artifact.pending()
        assert name in problems(tmp_path / "clips")
        path.write_bytes(good)


def test_plan_refuses_changed_rows_bad_keys_and_grown_shards(tmp_path):
    artifact = make(str(tmp_path / "clips"), {0: ["a.mp4"], 1: ["b.mp4"]})
    with pytest.raises(ValueError, match="planned already"):
        artifact.append_plan(plan_table({0: ["b.mp4"], 1: ["a.mp4"], 2: ["c.mp4"]}))
    with pytest.raises(ValueError, match=r"shards \[1\] are planned already"):
        artifact.append_plan(plan_table({1: ["c.mp4"]}))
    with pytest.raises(ValueError, match="twice"):
        artifact.append_plan(plan_table({5: ["c.mp4", "c.mp4"]}))
    bad = plan_table({5: ["c.mp4"]}).set_column(1, "key", pa.array(["vid.001"]))
    with pytest.raises(ValueError, match="not 32 lower-case hex digits"):
        artifact.append_plan(bad)
    assert artifact.plan.num_rows == 2


def test_writer_refuses_unplanned_unordered_and_lost_samples(tmp_path):
    artifact = Artifact.open(tmp_path / "clips", kind="clips", config=CONFIG)
    artifact.append_plan(plan_table(SHARDS))
    with pytest.raises(ValueError, match="neither written nor quarantined"):
        with artifact.shard_writer(0) as writer:
            writer.add(sample_key("a.mp4"), payloads("a.mp4"), row={})
            writer.commit()
    with pytest.raises(ValueError, match="not planned in shard 0"), artifact.shard_writer(0) as writer:
        writer.add(sample_key("c.mp4"), payloads("c.mp4"), row={})
    with pytest.raises(ValueError, match="out of the plan's order"), artifact.shard_writer(0) as writer:
        writer.add(sample_key("b.mp4"), payloads("b.mp4"), row={})
        writer.add(sample_key("a.mp4"), payloads("a.mp4"), row={})
    with pytest.raises(ValueError, match="extension 'MP4'"), artifact.shard_writer(0) as writer:
        writer.add(sample_key("a.mp4"), {"MP4": b""}, row={})
    assert artifact.pending() == [0, 1, 2]
    assert sorted(tree(tmp_path / "clips")) == ["_plan.parquet", "manifest.json"]


def test_a_member_too_large_for_a_tar_is_refused(monkeypatch, tmp_path):
    from kinema.pipelines.artifacts import tar

    monkeypatch.setattr(tar, "LARGEST_MEMBER_BYTES", 100)
    builder = tar.TarBuilder(io.BytesIO().write)
    with pytest.raises(ValueError, match="more than the 8 GiB"):
        builder.add(sample_key("a"), {"mp4": bytes(101)})
    assert builder.num_bytes == 0


STEPS = ["publish", "write", "remove"]


@pytest.mark.parametrize("kill_at", range(1, 14))
def test_killed_at_any_step_then_rerun_gives_the_same_bytes(tmp_path, monkeypatch, kill_at):
    """The process disappears after the n-th change of the folder; the next run must not notice."""

    class Killed(BaseException):
        pass

    make(str(tmp_path / "calm"), SHARDS, skip=("f.mp4",))
    count = 0
    with monkeypatch.context() as patch:
        for name in STEPS:
            original = getattr(store_module.LocalStore, name)

            def step(self, *args, original=original, **kwargs):
                nonlocal count
                count += 1
                if count == kill_at:
                    raise Killed
                return original(self, *args, **kwargs)

            patch.setattr(store_module.LocalStore, name, step)
        patch.setattr(store_module.TemporaryFile, "discard", lambda self: self.file.close())
        with pytest.raises(Killed):
            make(str(tmp_path / "killed"), SHARDS, skip=("f.mp4",))
    make(str(tmp_path / "killed"), SHARDS, skip=("f.mp4",))
    assert tree(tmp_path / "killed") == tree(tmp_path / "calm")


def test_temporary_files_of_dead_writers_are_swept_and_of_living_ones_kept(tmp_path):
    artifact = make(str(tmp_path / "clips"), SHARDS)
    dead = tmp_path / "clips" / f"{store_module.TEMPORARY_PREFIX}{artifact.shard_name(0)}-0123456789ab"
    dead.write_bytes(b"half a shard")
    stranger = tmp_path / "clips" / "notes.tmp"
    stranger.write_bytes(b"not ours")
    (tmp_path / "clips" / "_commits" / "000001.json").unlink()
    with artifact.shard_writer(1) as writer:
        Artifact.open(tmp_path / "clips", kind="clips", config=CONFIG)
        assert not dead.exists() and stranger.exists()
        writer.add(sample_key("c.mp4"), payloads("c.mp4"), row={"source": "c.mp4", "score": 0.5})
        writer.commit(input_hashes={"in": "ab"})
    stranger.unlink()
    assert artifact.verify() == []


def test_two_writers_of_one_shard_end_in_one_good_shard(url):
    artifact = Artifact.open(url, kind="clips", config=CONFIG)
    artifact.append_plan(plan_table(SHARDS))
    with artifact.shard_writer(0) as one, artifact.shard_writer(0) as two:
        for source in SHARDS[0]:
            one.add(sample_key(source), payloads(source), row={"source": source})
            two.add(sample_key(source), payloads(source), row={"source": source})
        first, second = one.commit(), two.commit()
    assert first == second
    build(artifact, 1)
    build(artifact, 2)
    artifact.finalize()
    assert artifact.verify() == []


def test_what_a_killed_put_left_on_an_object_store_is_replaced(tmp_path):
    import fsspec

    url = f"memory://left-{tmp_path.name}/clips"
    artifact = Artifact.open(url, kind="clips", config=CONFIG)
    artifact.append_plan(plan_table({0: ["a.mp4"]}))
    fsspec.filesystem("memory").pipe_file(artifact.shard_url(0).removeprefix("memory:/"), b"other bytes")
    build(artifact, 0)
    artifact.finalize()
    assert artifact.verify() == []


def problems(folder: Path) -> str:
    return "\n".join(str(p) for p in Artifact.read(folder).verify())


def test_verify_finds_any_flipped_byte_of_a_shard(tmp_path):
    artifact = make(str(tmp_path / "clips"), {0: ["a.mp4"]})
    path = Path(artifact.shard_url(0))
    good = path.read_bytes()
    for place in [*range(0, len(good), 97), len(good) - 1]:
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        assert path.name in problems(tmp_path / "clips"), place
    path.write_bytes(good)
    assert problems(tmp_path / "clips") == ""


@pytest.mark.parametrize("cut", [1, 512, 1024, 1536, 3000])
def test_verify_finds_a_cut_tar_and_it_is_built_again(tmp_path, cut):
    artifact = make(str(tmp_path / "clips"), SHARDS)
    calm = tree(tmp_path / "clips")
    path = Path(artifact.shard_url(2))
    path.write_bytes(path.read_bytes()[:-cut])
    assert path.name in problems(tmp_path / "clips")
    assert artifact.pending() == [2]
    build(artifact, 2)
    assert tree(tmp_path / "clips") == calm


def test_verify_finds_missing_and_foreign_files(tmp_path):
    folder = tmp_path / "clips"
    artifact = make(str(folder), SHARDS)
    commit = folder / "_commits" / "000001.json"
    kept = commit.read_bytes()
    commit.unlink()
    assert "000001.json: missing" in problems(folder)
    commit.write_bytes(b"{}")
    assert "000001.json: damaged" in problems(folder)
    commit.write_bytes(kept)
    rows = folder / "_commits" / "000001.parquet"
    kept_rows = rows.read_bytes()
    rows.unlink()
    assert "000001.parquet: missing" in problems(folder)
    rows.write_bytes(kept_rows)
    extra = folder / artifact.shard_name(7)
    extra.write_bytes(Path(artifact.shard_url(0)).read_bytes())
    assert f"{extra.name}: is not in the plan" in problems(folder)
    extra.unlink()
    Path(artifact.shard_url(1)).unlink()
    assert "missing although it is committed" in problems(folder)


def test_verify_finds_swapped_shards_and_changed_tables(tmp_path):
    folder = tmp_path / "clips"
    artifact = make(str(folder), {0: ["a.mp4"], 1: ["b.mp4"]})
    samples = folder / "samples.parquet"
    good = samples.read_bytes()
    samples.write_bytes(good[:200] + bytes([good[200] ^ 1]) + good[201:])
    assert "samples.parquet" in problems(folder)
    samples.write_bytes(good)
    one, two = Path(artifact.shard_url(0)), Path(artifact.shard_url(1))
    bytes_one, bytes_two = one.read_bytes(), two.read_bytes()
    one.write_bytes(bytes_two)
    two.write_bytes(bytes_one)
    assert one.name in problems(folder) and two.name in problems(folder)


def test_quarantine_survives_kills_and_is_cleared_when_the_source_is_good(url):
    artifact = Artifact.open(url, kind="clips", config=CONFIG)
    entry = {"source": "x.mp4", "stage": "shard", "error_class": "InvalidData", "message": "no frames"}
    artifact.quarantine([entry, {**entry, "source": "y.mp4"}])
    artifact.quarantine([{**entry, "message": "no frames at all"}])
    artifact.append_plan(plan_table({0: ["a.mp4", "z.mp4"]}))
    build(artifact, 0, skip=("z.mp4",))
    artifact.finalize()
    listed = [(r["source"], r["message"], r["shard"]) for r in artifact.quarantined().to_pylist()]
    assert listed == [("x.mp4", "no frames at all", None), ("y.mp4", "no frames", None), ("z.mp4", "bad file", 0)]
    assert artifact.verify() == []

    artifact.clear_quarantine(["x.mp4", "z.mp4"])
    assert [r["source"] for r in artifact.quarantined().to_pylist()] == ["y.mp4", "z.mp4"]
    fixed = pa.Table.from_pylist(
        [{"shard": 1, "key": sample_key("z.mp4", "mended"), "source": "z.mp4"}], schema=artifact.plan.schema
    )
    artifact.append_plan(fixed)
    artifact.clear_quarantine(["z.mp4"])
    build(artifact, 1)
    artifact.finalize()
    assert [r["source"] for r in artifact.quarantined().to_pylist()] == ["y.mp4"]
    assert artifact.verify() == []


def test_a_quarantined_shard_stays_pending_and_its_entries_go_when_it_is_built(tmp_path):
    artifact = make(str(tmp_path / "calm"), SHARDS)
    crashed = Artifact.open(tmp_path / "clips", kind="clips", config=CONFIG)
    crashed.append_plan(plan_table(SHARDS))
    entry = {"stage": "shard", "error_class": "WorkerCrash", "message": "killed", "attempts": 3}
    crashed.quarantine([{**entry, **row} for row in crashed.plan_of(1).to_pylist()])
    for shard in (0, 2):
        build(crashed, shard)
    crashed.finalize()
    assert crashed.verify() == []
    assert crashed.pending() == [1]
    build(crashed, 1)
    crashed.finalize()
    assert crashed.quarantined().num_rows == 0
    assert tree(tmp_path / "clips") == tree(tmp_path / "calm")
    assert artifact.verify() == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch, number):
    artifact = Artifact.open(tmp_path / "clips", kind="clips", config=CONFIG)
    artifact.append_plan(plan_table(SHARDS))
    before = tree(tmp_path / "clips")

    def full(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(StageError, match=r"disk full while writing .*tar: free at least \d+ MB there or set out="):
        build(artifact, 0)
    assert tree(tmp_path / "clips") == before


def test_a_really_full_disk_leaves_finished_shards_only(tmp_path):
    """On a file system of 1 MB in a mount namespace of its own."""
    script = """
import sys
from pathlib import Path
import pyarrow as pa
from kinema.pipelines.artifacts import Artifact, sample_key
from kinema.pipelines.errors import StageError
artifact = Artifact.open(sys.argv[1] + "/clips", kind="clips", config={})
names = ["a", "b", "c"]
artifact.append_plan(pa.table({"shard": [0, 1, 2], "key": [sample_key(n) for n in names], "source": names}))
try:
    for shard in range(3):
        with artifact.shard_writer(shard) as writer:
            writer.add(sample_key(names[shard]), {"mp4": bytes(400_000)}, row={})
            writer.commit()
except StageError as error:
    print(error)
print(len(list(Path(sys.argv[1]).rglob("*.tar"))), len(list(Path(sys.argv[1]).rglob(".*"))), artifact.pending())
"""
    mount = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, script]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here; the simulated full disk covers the rest")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    message, state = done.stdout.splitlines()
    assert re.fullmatch(
        r"disk full while writing \S+clips-\w+-000002.tar: free at least 1 MB there or set out= .*", message
    )
    assert state == "2 0 [2]"


def test_an_artifact_travels_to_workers(url):
    artifact = make(url, SHARDS)
    there = pickle.loads(pickle.dumps(artifact))
    assert there.plan.equals(artifact.plan)
    assert there.pending() == []


def test_an_unknown_store_is_said_so():
    with pytest.raises(ValueError, match="nosuch://bucket/clips cannot be opened: .*nosuch"):
        Artifact.open("nosuch://bucket/clips", kind="clips", config={})


def test_ranged_reads_name_the_file_that_is_missing_or_short(url):
    artifact = make(url, SHARDS)
    with pytest.raises(ValueError, match="ends early"):
        read_range(artifact.shard_url(0), 10, 1 << 20)
    with pytest.raises(ValueError, match=r"000009\.tar does not exist"):
        read_range(artifact.shard_url(9), 0, 1)


def test_damaged_rows_of_a_shard_are_named_with_the_way_out(tmp_path):
    artifact = make(str(tmp_path / "a"), {0: ["x", "y"], 1: ["z"]})
    path = tmp_path / "a" / "_commits" / "000000.parquet"
    whole = path.read_bytes()
    for damaged in (whole[:40], b"NOTWHATITWAS" + whole[12:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"000000.parquet is damaged .*; remove it and run the same command"):
            artifact.finalize()
    path.unlink()
    assert artifact.pending() == [0], "built again"
