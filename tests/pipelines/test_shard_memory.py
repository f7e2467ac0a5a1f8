"""The shard stage holds a few frames and about 90 bytes of each frame, however long a recording is."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from made_videos import paint, write_video

PEAK = """
import os, resource, sys
os.environ["KINEMA_ENGINE"] = "serial"
from kinema.configs import ClipConfig, ShardConfig
from kinema.pipelines.shard import run
clip = ClipConfig(preset="ultrafast", seconds=30.0)
summary = run(ShardConfig(videos=sys.argv[1], out=sys.argv[2], clip=clip, min_shards=1), report=lambda _: None)
assert summary.quarantined == 0 and summary.clips > 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak_mb(folder: Path, minutes: int, fps: int) -> float:
    """Highest resident memory of a process that shards a video of this length."""
    pictures = [paint(i, shift=i) for i in range(96)]
    frames = _Repeated(pictures, minutes * 60 * fps)
    path = write_video(folder / f"{minutes}" / "long.mp4", frames, fps=Fraction(fps), options={"g": "60"})
    command = [sys.executable, "-c", PEAK, str(path), str(folder / f"out{minutes}")]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


class _Repeated:
    """A long sequence of a few pictures."""

    def __init__(self, pictures, length: int):
        self.pictures, self.length = pictures, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        if index >= self.length:
            raise IndexError(index)
        return self.pictures[index % len(self.pictures)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hours_need_no_more_memory_than_five_minutes(tmp_path):
    short, long = peak_mb(tmp_path, 5, fps=2), peak_mb(tmp_path, 120, fps=2)
    print(f"peak {short:.0f} MB for 5 minutes, {long:.0f} MB for 2 hours")
    assert long - short < 64, (short, long)
