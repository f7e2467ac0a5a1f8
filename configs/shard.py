"""Settings of `kinema shard`: sources, clips, shards."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from kinema.configs.checks import require
from kinema.configs.flow_dataset import FlowDatasetConfig
from kinema.configs.rendered import RenderedConfig

FlowLayout = Literal[
    "flyingchairs",
    "flyingthings3d",
    "sintel",
    "kitti2012",
    "kitti2015",
    "hd1k",
    "spring",
    "tartanair",
    "viper",
    "middlebury",
]
"""Published data sets of image pairs with known flow."""


_LATER_SETTINGS = ("fill_slots", "square_pixels", "deinterlace")


@dataclass(frozen=True)
class ClipConfig:
    """How clips are cut, resampled and encoded. Its hash is part of every sample key and of the artifact."""

    seconds: float = 4.0
    """Longest clip, in seconds; a shot is divided into clips of equal length no longer than this."""
    fps: float = 0.0
    """Frames per second of the clips; 0 keeps the source's average rate. Resampled by timestamps."""
    min_frames: int = 2
    """Shots and remainders with fewer frames (after resampling) are dropped and counted."""
    short_side: int = 0
    """Resize so that the shorter side has this many pixels (never enlarged); 0 keeps the size."""
    cuts: Literal["content", "adaptive", "none"] = "content"
    """Shot detector (PySceneDetect's ContentDetector or AdaptiveDetector), or no cuts at all."""
    cut_threshold: float = 27.0
    """Threshold of the detector, in its own units (27 is ContentDetector's published default)."""
    codec: Literal["h264", "h264_lossless", "hevc", "av1", "mjpeg", "mpeg4", "copy"] = "h264"
    """`h264_lossless` keeps the RGB picture exactly (libx264rgb at quantiser 0); the others are 4:2:0 and lossy. `copy`
    takes over the source's own H.264, HEVC or AV1 packets, cut at its keyframes, and encodes h264 where it cannot.
    `mpeg4` (part 2) is for random reading with few pictures in a group: faster to decode than h264, and larger."""
    crf: int = 18
    """Quality of h264, hevc, av1 (constant rate factor, 0..51, lower is better); quantisers of mjpeg,
    2 + crf/6, and of mpeg4, 2^((crf - 7) / 6), are rounded, 1..31."""
    gop: int = 12
    """Closed group of pictures, in frames: every `gop` frames a keyframe that nothing refers across."""
    fill_slots: int = 4
    """Longest run of empty slots in a source's frame grid that is filled by repeating the frame before (the sample says
    which); at longer holes the clip is cut. 0 cuts at every empty slot."""
    square_pixels: bool = True
    """Resample pixels that are not square to square ones; no keeps their shape and tags it."""
    deinterlace: bool = True
    """Make interlaced frames (by their flags) progressive, one for each; no keeps both fields woven."""
    preset: str = "medium"
    """Encoder speed preset of x264/x265, for example `veryfast`."""

    def __post_init__(self) -> None:
        require(self.seconds > 0, "clip.seconds", self.seconds, "use a positive number of seconds")
        require(self.fps >= 0, "clip.fps", self.fps, "use a positive rate, or 0 to keep the source's")
        require(self.min_frames >= 1, "clip.min_frames", self.min_frames, "use 1 or more")
        require(
            self.short_side == 0 or self.short_side >= 16,
            "clip.short_side",
            self.short_side,
            "use 0 or >= 16",
        )
        require(0 <= self.crf <= 51, "clip.crf", self.crf, "use 0 (best) to 51")
        require(self.fill_slots >= 0, "clip.fill_slots", self.fill_slots, "use 0 or more slots")
        require(self.gop >= 1, "clip.gop", self.gop, "use 1 or more frames")

    def content(self) -> dict[str, Any]:
        """The settings as artifacts' hashes and keys hold them.

        Settings that older artifacts do not name are left out at their defaults, so that keys and names stay.
        """
        settings = asdict(self)
        same = [name for name in _LATER_SETTINGS if settings[name] == type(self).__dataclass_fields__[name].default]
        return {name: value for name, value in settings.items() if name not in same}


@dataclass(frozen=True)
class MasksConfig:
    """How object masks of frame folders are read."""

    palette: tuple[str, ...] = ()
    """Labels of RGB masks' colours, `RRGGBB=LABEL`, and of 16-bit numbers, `id300=2`; empty knows VOC's and DAVIS's."""


@dataclass(frozen=True)
class ShardConfig:
    """`kinema shard`: videos in, clips/ out."""

    videos: str = ""
    """Folder, glob, file, bucket URL, list or manifest (.txt, .csv, .jsonl, .parquet), frame folders, or tars."""
    out: str = ""
    """Folder or URL of the clips artifact."""
    layout: Literal["auto", "videos", "frames", "webdataset", "manifest", "list", "rendered", FlowLayout] = "auto"
    """What `videos` holds; `auto` looks at it. The name of a data set packs its pairs without loss, and their flow;
    `rendered` renders shots with exact flow, textured with the images in `videos` (empty: procedural textures)."""
    flow: str = ""
    """Folder or URL of the flow artifact of a data set with known flow; empty: flow/truth beside out."""
    dataset: FlowDatasetConfig = field(default_factory=FlowDatasetConfig)
    """Which part of a data set with known flow is packed."""
    root: str = ""
    """Folder or URL that the paths of a list or manifest are relative to; empty: the list's own folder."""
    rendered: RenderedConfig = field(default_factory=RenderedConfig)
    """Shots of layout rendered."""
    frames_fps: float = 24.0
    """Frame rate given to frame folders, which carry none (DAVIS 24; YouTube-VOS 30, or 6 if every fifth)."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """How clips are cut and encoded."""
    stream: int = -1
    """Index of the video stream to take in every file; -1 takes the longest one that is no picture."""
    masks: MasksConfig = field(default_factory=MasksConfig)
    """How object masks are read."""
    shard_mb: int = 384
    """Intended size of a shard in MB; 256 to 512 keeps object stores and readers content."""
    min_shards: int = 8
    """At least this many shards where there are that many clips (4 per rank and loader worker is the aim)."""
    motion: Literal["vectors", "flow", "none"] = "vectors"
    """Motion score from the codec's motion vectors, from DIS flow on small frames, or not at all."""
    near_duplicate_bits: int = 4
    """Clips whose perceptual hashes differ in at most this many of 64 bits are marked as near duplicates."""
    allowed_quarantine: float = 0.5
    """Exit status 3 when more than this share of the sources was quarantined."""
    source_timeout_s: float = 1800.0
    """A source whose decoder makes no progress for this long is killed and quarantined."""
    source_memory_gb: float = 8.0
    """A source whose decoding needs more memory than this is quarantined; 0: no limit."""
    num_workers: int = 0
    """Shards built at once; 0 means one per CPU that Ray has."""

    def __post_init__(self) -> None:
        require(self.shard_mb >= 1, "shard_mb", self.shard_mb, "use 1 or more (256 to 512 is usual)")
        require(self.min_shards >= 1, "min_shards", self.min_shards, "use 1 or more")
        require(self.stream >= -1, "stream", self.stream, "use a stream's index, or -1 to choose")
        require(
            self.source_memory_gb >= 0, "source_memory_gb", self.source_memory_gb, "use gigabytes, or 0 for no limit"
        )
        require(self.frames_fps > 0, "frames_fps", self.frames_fps, "use a positive rate")
        require(
            0 <= self.allowed_quarantine <= 1,
            "allowed_quarantine",
            self.allowed_quarantine,
            "use a share, 0 to 1",
        )
