"""A property of all recordings: clips hold every frame once, in order, in time, upright, in its shape.

`python tests/pipelines/test_shard_recordings.py FIRST COUNT` runs a campaign and prints what fails.
"""

import io
import json
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import pytest

from kinema.configs import ClipConfig, ShardConfig
from kinema.pipelines.artifacts import Artifact, read_range
from kinema.pipelines.shard import run
from kinema.pipelines.video.packets import to_rgb

sys.path.insert(0, str(Path(__file__).parent))
from made_recordings import MATRICES, Part, Recording, draw_recording
from made_videos import number_of


def clips_of(recording: Recording, out: Path) -> list[dict]:
    """Rows with json and the numbers that are seen in the frames."""
    clip = ClipConfig(cuts="none", preset="ultrafast", crf=14, seconds=1.0)
    config = ShardConfig(videos=str(recording.path), out=str(out), clip=clip, min_shards=1, motion="none")
    summary = run(config, report=lambda _: None)
    artifact = Artifact.read(str(out))
    reasons = [row["message"] for row in artifact.quarantined().to_pylist()]
    assert summary.quarantined == 0, reasons
    rows = artifact.samples().to_pylist()
    for row in rows:
        url = artifact.shard_url(row["shard"])
        row["json"] = json.loads(read_range(url, row["json_offset"], row["json_size"]))
        with av.open(io.BytesIO(read_range(url, row["mp4_offset"], row["mp4_size"]))) as container:
            row["numbers"] = [number_of(to_rgb(frame)) for frame in container.decode(video=0)]
        row["repeated"] = row["json"].get("irregular", {}).get("repeated_frames", [])
    return rows


def check_recording(recording: Recording, out: Path) -> None:
    """Raises: AssertionError that says what is wrong."""
    rows = clips_of(recording, out)
    first = recording.drawn.get("head", 0)
    for part in recording.parts:
        for shot in part.shots():
            expected = [(first + index) % 256 for index in shot]
            if len(expected) >= 2:
                _check_shot(rows, expected, part, shot)
        first += len(part.slots)
    assert not rows, f"clips of no frames that were filmed: {[row['numbers'] for row in rows]}"


def _check_shot(rows: list[dict], expected: list[int], part: Part, shot: list[int]) -> None:
    """Takes the clips of a shot from the front of `rows`."""
    slots = [part.slots[index] for index in shot]
    shown: list[int] = []
    while len(shown) < len(expected):
        assert rows, f"frames {expected[len(shown) :]} are in no clip"
        row = rows.pop(0)
        kept = [number for i, number in enumerate(row["numbers"]) if i not in row["repeated"]]
        assert kept == expected[len(shown) : len(shown) + len(kept)], "order and completeness"
        assert abs(Fraction(row["fps_num"], row["fps_den"]) / part.fps - 1) < Fraction(1, 1000), "rate"
        assert abs(row["width"] - part.size[0]) <= 3 and abs(row["height"] - part.size[1]) <= 3, "geometry"
        assert row["json"]["color"]["matrix"] == MATRICES[part.matrix], "colour"
        assert ("interlaced_frames" in row["json"].get("irregular", {})) == part.interlaced
        _check_times(row, part, slots, len(shown))
        shown += kept


def _check_times(row: dict, part: Part, slots: list[int], position: int) -> None:
    for i in range(row["num_frames"]):
        if i in row["repeated"]:
            continue
        due = float(part.start + slots[position] / part.fps)
        seen = row["start_s"] + i * row["fps_den"] / row["fps_num"]
        assert seen == pytest.approx(due, abs=0.6 / float(part.fps)), "time"
        position += 1


def run_seed(seed: int, folder: Path) -> None:
    """One draw; a failure names its seed."""
    recording = draw_recording(seed, folder)
    try:
        check_recording(recording, folder / "out")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{recording.drawn}") from error


@pytest.mark.parametrize("seed", range(20))
def test_every_frame_of_a_recording_is_in_its_clips(seed, tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    run_seed(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 1200, 20))
def test_every_frame_of_two_hundred_recordings_is_in_their_clips(start, tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    for seed in range(start, start + 20):
        (tmp_path / str(seed)).mkdir()
        run_seed(seed, tmp_path / str(seed))


def campaign(first: int, count: int) -> None:
    """Run many draws and report those that fail."""
    failed = 0
    for done, seed in enumerate(range(first, first + count), start=1):
        with tempfile.TemporaryDirectory() as folder:
            try:
                run_seed(seed, Path(folder))
            except (AssertionError, ValueError, av.FFmpegError) as error:
                failed += 1
                print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
        if done % 50 == 0:
            print(f"{done} of {count}, {failed} failed", flush=True)
    print(f"{count} draws, {failed} failed", flush=True)


if __name__ == "__main__":
    campaign(int(sys.argv[1]), int(sys.argv[2]))
