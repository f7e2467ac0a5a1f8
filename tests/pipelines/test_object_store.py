"""Artifacts in a bucket, on a server that is slow, refuses, hangs up and cuts: same bytes, or one clear line."""

import hashlib
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pyarrow as pa
import pytest

from kinema.pipelines.artifacts import Artifact, object_store, read_range, remote, sample_key
from kinema.pipelines.artifacts.store import open_store, read_ranges
from kinema.pipelines.errors import StageError

sys.path.insert(0, str(Path(__file__).parent))
from s3_server import KEY, SECRET, s3_server


@pytest.fixture
def s3(monkeypatch):
    # Waits of a test, not of a data centre.
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(remote, "_LONGEST_WAIT_S", 0.1)
    monkeypatch.setenv("KINEMA_STORE_TIMEOUT_S", "20")
    with s3_server() as faults:
        yield faults


def build(url: str, num_shards: int = 2) -> Artifact:
    artifact = Artifact.open(url, kind="clips", config={"a": 1})
    names = [f"{shard}-{place}" for shard in range(num_shards) for place in range(3)]
    shards = pa.array([int(name[0]) for name in names], pa.int32())
    artifact.append_plan(pa.table({"shard": shards, "key": [sample_key(n) for n in names], "source": names}))
    for shard in artifact.pending():
        with artifact.shard_writer(shard) as writer:
            for key, source in writer.planned.items():
                writer.add(key, {"bin": hashlib.sha256(key.encode()).digest() * 3000}, row={"source": source})
            writer.commit()
    artifact.finalize()
    return artifact


@pytest.mark.parametrize("fault", ["500", "503", "cut", "lost"])
def test_an_artifact_is_the_same_whatever_the_server_does(s3, tmp_path, fault):
    local = build(str(tmp_path / "clips"))
    s3.add(fault, 3, "^GET")
    s3.add(fault, 3, "^PUT" if fault != "cut" else "^GET")
    artifact = build("s3://kinema/clips")
    assert s3.queue == []
    s3.add(fault, 4, "^GET /kinema/clips/clips-")
    assert artifact.verify() == [] and s3.queue == []
    assert artifact.manifest_hash() == local.manifest_hash()
    assert artifact.samples().equals(local.samples())
    assert build("s3://kinema/clips").pending() == []


def test_a_server_that_hangs_is_left_and_asked_again(s3, monkeypatch):
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 0.5)
    open_store("s3://kinema/x").write("a", b"abc")
    s3fs.S3FileSystem.clear_instance_cache()
    s3.hang_s = 2
    s3.add("hang", 2, "^GET /kinema/x/a")
    started = time.monotonic()
    assert read_range("s3://kinema/x/a", 1, 2) == b"bc"
    assert time.monotonic() - started < 8


def test_the_total_time_is_bounded_and_the_end_is_one_line_without_secrets(s3, monkeypatch, capsys):
    open_store("s3://kinema/x").write("a", b"abc")
    monkeypatch.setenv("KINEMA_STORE_TIMEOUT_S", "1")
    monkeypatch.setattr(remote, "_SAY_AFTER_S", 0.0)
    monkeypatch.setattr(remote, "_said_at", float("-inf"))  # said at most every half minute in a process
    s3.add("503", 1000, "^GET /kinema/x/a")
    started = time.monotonic()
    with pytest.raises(StageError, match="s3://kinema/x/a does not answer for .*KINEMA_STORE_TIMEOUT_S") as raised:
        read_range("s3://kinema/x/a", 0, 3)
    assert time.monotonic() - started < 10
    said = str(raised.value) + capsys.readouterr().err
    assert "try " in said and "\n" not in str(raised.value)
    assert KEY not in said and SECRET not in said


def test_what_is_refused_or_missing_is_not_tried_again(s3):
    store = open_store("s3://kinema/x")
    with pytest.raises(FileNotFoundError):
        store.read("nothing")
    with pytest.raises(ValueError, match="does not exist"):
        read_range("s3://kinema/x/nothing", 0, 3)
    with pytest.raises(ValueError, match="holds no artifact"):
        Artifact.read("s3://no-such-bucket/clips")
    store.write("a", b"abc")
    with pytest.raises(ValueError, match="ends early: 9 bytes were expected at 0, 3 are there"):
        read_range("s3://kinema/x/a", 0, 9)
    assert len([line for line in s3.log if "no-such-bucket" in line]) < 4


def test_create_only_put_keeps_an_equal_object_and_replaces_a_different_one(s3, monkeypatch):
    monkeypatch.setattr(object_store, "PART_BYTES", 5 << 20)
    store = open_store("s3://kinema/x")
    large = bytes(range(256)) * 45_000  # three parts
    digest = hashlib.sha256(large).hexdigest()
    for name, lost in (("a", "PUT /kinema/x/a"), ("b", "POST /kinema/x/b.*uploadId")):
        s3.add("lost", 1, lost)
        data = large if name == "b" else b"small"
        with store.build(name) as temporary:
            temporary.write(data)
            store.publish(temporary, name, hashlib.sha256(data).hexdigest())
        assert s3.queue == [] and store.read(name) == data
    store.write("c", b"of a killed run")
    with store.build("c") as temporary:
        temporary.write(large)
        store.publish(temporary, "c", digest)
    with store.open("c") as file:
        assert file.seek(-256, 2) == len(large) - 256 and file.read() == bytes(range(256))
        file.seek(0)
        assert hashlib.sha256(file.read()).hexdigest() == digest
    # Parts of uploads that failed are not left to be paid for.
    import boto3

    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket="kinema")


def test_near_ranges_are_one_request_and_far_ones_come_at_the_same_time(s3):
    data = bytes(range(256)) * 16_000
    open_store("s3://kinema/x").write("a", data)
    s3.log.clear()
    ranges = [(0, 100), (5_000, 50), (90_000, 10), (2_000_000, 7), (4_000_000, 9)]
    s3.latency_s = 0.2
    started = time.monotonic()
    blocks = read_ranges("s3://kinema/x/a", ranges[::-1])
    elapsed = time.monotonic() - started
    s3.latency_s = 0
    assert [start for start, _ in blocks] == [0, 2_000_000, 4_000_000]
    assert len([line for line in s3.log if line.startswith("GET /kinema/x/a")]) == 3
    assert all(data[start : start + len(block)] == block for start, block in blocks)
    assert len(blocks[0][1]) == 90_010 and elapsed < 0.55 + 2


@pytest.mark.parametrize(
    "url",
    [
        f"s3://{KEY}:{SECRET}@kinema/clips",
        f"s3://kinema/clips?X-Amz-Signature={SECRET}",
        f"az://box/clips?sv=1&sig={SECRET}",
        f"hdfs://me:{SECRET}@host/clips",
    ],
)
def test_a_url_with_credentials_is_refused_without_repeating_them(url):
    with pytest.raises(ValueError, match="carries credentials.*environment") as raised:
        open_store(url)
    assert SECRET not in str(raised.value)


def test_nothing_an_artifact_holds_names_credentials(s3):
    build("s3://kinema/clips")
    import boto3

    client = boto3.client("s3")
    for entry in client.list_objects_v2(Bucket="kinema")["Contents"]:
        data = client.get_object(Bucket="kinema", Key=entry["Key"])["Body"].read()
        assert KEY.encode() not in data and SECRET.encode() not in data


def test_secrets_are_taken_out_of_any_text(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    text = f"GET https://h/x?X-Amz-Credential=a%2Fb&X-Amz-Signature=0ff&y=1 with {SECRET} by http://u:pw@host/"
    cleaned = remote.without_secrets(text)
    assert SECRET not in cleaned and "0ff" not in cleaned and "pw" not in cleaned and "&y=1" in cleaned


def test_retries_draw_from_no_generator_that_training_uses(s3):
    """Copies of a run and fetches of shards run beside training steps, whose numbers must not depend on the store."""
    random.seed(3)
    expected = random.random()
    random.seed(3)
    s3.add("500", 3)
    open_store("s3://kinema/r").write("a", b"x")
    assert s3.queue == [] and random.random() == expected


def test_sources_in_a_bucket_are_asked_for_again_and_a_refused_one_is_quarantined(s3, tmp_path, monkeypatch):
    """Listing, hashing, tars and lists go through the same retries; what the store denies costs that file."""
    import tarfile

    from kinema.pipelines.shard.media import Source, content_hash, open_bytes, read_all
    from kinema.pipelines.shard.sources import find_sources
    from kinema.pipelines.video.errors import Missing
    from kinema.pipelines.workflow import listing_hash, source_listing

    files = fsspec.filesystem("s3")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        (tmp_path / "x.mp4").write_bytes(b"x" * 1000)
        tar.add(tmp_path / "x.mp4", "x.mp4")
    files.put_file(str(tmp_path / "t.tar"), "kinema/v/t.tar")
    files.pipe_file("kinema/v/a.mp4", b"a" * 1000)
    for fault in ("500", "503", "500"):
        s3.add(fault)
    found = find_sources("s3://kinema/v")
    assert [source.id for source in found.sources] == ["a.mp4", "t.tar/x.mp4"] and not found.missing
    calm = [content_hash(source) for source in found.sources]
    for fault, where in (("500", "GET"), ("cut", "GET"), ("503", "GET"), ("cut", "GET")):
        s3.add(fault, where=where)
    assert [content_hash(source) for source in found.sources] == calm
    assert s3.queue == []
    s3.add("500", 2)
    assert read_all("s3://kinema/v/a.mp4") == b"a" * 1000 and open_bytes("s3://kinema/v/a.mp4").read(3) == b"aaa"
    s3.add("503", 2)
    assert len(source_listing("s3://kinema/v")) == 2 and len(listing_hash("s3://kinema/v")) == 32
    with pytest.raises(Missing):
        content_hash(Source("gone.mp4", "s3://kinema/v/gone.mp4"))

    def denied(*_: object, **__: object) -> int:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(remote, "filesystem", lambda url: (SimpleNamespace(size=denied), url))
    with pytest.raises(Missing, match="access denied"):
        content_hash(Source("a.mp4", "s3://kinema/v/a.mp4"))
