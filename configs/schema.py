"""Every setting of every stage, as frozen dataclasses.

A workflow file (configs/*.yaml) has one section per stage; a stage command reads its own section and takes
`key=value` overrides relative to it. `kinema.configs.load` merges defaults < file < command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def _require(holds: bool, key: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{key}={value} is out of range: {rule}")


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
    codec: Literal["h264", "h264_lossless", "hevc", "av1", "mjpeg"] = "h264"
    """`h264_lossless` keeps the RGB picture exactly (libx264rgb at quantiser 0); the others are 4:2:0 and lossy."""
    crf: int = 18
    """Quality of h264, hevc, av1 (constant rate factor, 0..51, lower is better); mjpeg: qscale 2 + crf/6."""
    gop: int = 12
    """Closed group of pictures, in frames: every `gop` frames a keyframe that nothing refers across."""
    preset: str = "medium"
    """Encoder speed preset of x264/x265, for example `veryfast`."""

    def __post_init__(self) -> None:
        _require(self.seconds > 0, "clip.seconds", self.seconds, "use a positive number of seconds")
        _require(self.fps >= 0, "clip.fps", self.fps, "use a positive rate, or 0 to keep the source's")
        _require(self.min_frames >= 1, "clip.min_frames", self.min_frames, "use 1 or more")
        _require(
            self.short_side == 0 or self.short_side >= 16,
            "clip.short_side",
            self.short_side,
            "use 0 or >= 16",
        )
        _require(0 <= self.crf <= 51, "clip.crf", self.crf, "use 0 (best) to 51")
        _require(self.gop >= 1, "clip.gop", self.gop, "use 1 or more frames")


@dataclass(frozen=True)
class ShardConfig:
    """`kinema shard`: videos in, clips/ out."""

    videos: str = ""
    """Folder, glob, file, bucket URL, list file (.txt), manifest (.csv, .parquet), frame folders, or tars."""
    out: str = ""
    """Folder or URL of the clips artifact."""
    layout: Literal["auto", "videos", "frames", "webdataset", "manifest", "list"] = "auto"
    """What `videos` holds; `auto` looks at it."""
    frames_fps: float = 24.0
    """Frame rate given to frame folders, which carry none (DAVIS 24; YouTube-VOS 30, or 6 if every fifth)."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """How clips are cut and encoded."""
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
    num_workers: int = 0
    """Shards built at once; 0 means one per CPU that Ray has."""

    def __post_init__(self) -> None:
        _require(self.shard_mb >= 1, "shard_mb", self.shard_mb, "use 1 or more (256 to 512 is usual)")
        _require(self.min_shards >= 1, "min_shards", self.min_shards, "use 1 or more")
        _require(self.frames_fps > 0, "frames_fps", self.frames_fps, "use a positive rate")
        _require(
            0 <= self.allowed_quarantine <= 1,
            "allowed_quarantine",
            self.allowed_quarantine,
            "use a share, 0 to 1",
        )


@dataclass(frozen=True)
class TeachConfig:
    """`kinema teach`: clips/ in, flow/TEACHER/ out."""

    clips: str = ""
    """The clips artifact."""
    out: str = ""
    """Folder or URL of the flow artifact; empty: flow/TEACHER beside clips."""
    teacher: Literal["dis", "raft", "raft_small", "sea_raft_s", "sea_raft_m", "sea_raft_l", "smurf"] = "dis"
    """Flow network; `dis` needs no weights."""
    weights: str = ""
    """Checkpoint file or URL of the teacher; empty: the published weights of the ledger."""
    gaps: tuple[int, ...] = (1, 2)
    """Distances between the frames of a pair."""
    directions: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
    """forward: t -> t + gap; backward: t + gap -> t."""
    stride: int = 1
    """Pairs start at every `stride`-th frame."""
    iters: int = 0
    """Refinements; 0 means the network's usual number (RAFT and RAFT-small 20, SEA-RAFT 4, L 12, SMURF 12)."""
    scale: int = 0
    """SEA-RAFT sees the frames at 2^scale times their size; its Spring weights are meant for -1 on 1080p."""
    padding: Literal["sintel", "kitti"] = "sintel"
    """RAFT pads frames to multiples of 8: evenly on all sides, or (kitti) all rows below, as for its benchmark."""
    short_side: int = 0
    """Shorter side of the frames the teacher sees (never enlarged); flow is stored at that size; 0: original size."""
    max_megapixels: float = 0.0
    """Frames with more than this many million pixels (after short_side) are too large for memory; 0: no limit."""
    too_large: Literal["downscale", "tile"] = "downscale"
    """Such frames are reduced (flow is stored at that size), or cut into overlapping tiles whose flow is blended."""
    uncertainty: bool = False
    """Store the error the teacher itself expects beside the flow (SEA-RAFT only)."""
    compare: str = ""
    """Another teacher's flow of the same clips; the mean distance to it becomes the column pair_disagreement_px."""
    occlusion: bool = True
    """Store forward-backward occlusion (needs both directions)."""
    batch_pairs: int = 4
    """Pairs per network call."""
    num_actors: int = 0
    """Teacher actors; 0 means one per GPU or, without a GPU, as many as CPUs and memory allow."""
    threads_per_actor: int = 1
    """CPU threads each actor uses."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the teacher runs."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast dtype of the teacher; bf16 on GPU only."""
    allowed_quarantine: float = 0.05
    """Exit status 3 when more than this share of the clips was quarantined."""

    def __post_init__(self) -> None:
        _require(
            bool(self.gaps) and min(self.gaps) >= 1,
            "gaps",
            list(self.gaps),
            "use frame distances of 1 or more",
        )
        _require(bool(self.directions), "directions", list(self.directions), "name forward, backward or both")
        _require(self.stride >= 1, "stride", self.stride, "use 1 or more")
        _require(self.iters >= 0, "iters", self.iters, "use 1 or more, or 0 for the network's default")
        _require(self.batch_pairs >= 1, "batch_pairs", self.batch_pairs, "use 1 or more")
        _require(-4 <= self.scale <= 2, "scale", self.scale, "use -4 to 2; frames are resized by 2^scale")
        rule = "use 16 pixels or more, or 0 for the original size"
        _require(self.short_side == 0 or self.short_side >= 16, "short_side", self.short_side, rule)
        _require(
            self.max_megapixels == 0 or self.max_megapixels >= 0.02,
            "max_megapixels",
            self.max_megapixels,
            "use 0.02 or more (2.1 is full HD), or 0 for no limit",
        )
        _require(self.num_actors >= 0, "num_actors", self.num_actors, "use 1 or more, or 0 for what fits")
        _require(self.threads_per_actor >= 1, "threads_per_actor", self.threads_per_actor, "use 1 or more")
        _require(
            0 <= self.allowed_quarantine <= 1,
            "allowed_quarantine",
            self.allowed_quarantine,
            "use a share, 0 to 1",
        )


@dataclass(frozen=True)
class TrackConfig:
    """`kinema track`: clips/ (and flow/) in, tracks/TRACKER out."""

    clips: str = ""
    """The clips artifact."""
    flow: str = ""
    """The flow artifact that `chain` follows (gap 1 in both directions; longer gaps bridge occlusions)."""
    out: str = ""
    """Folder or URL of the tracks artifact; empty: tracks/TRACKER beside clips."""
    tracker: Literal["chain", "cotracker3"] = "chain"
    """`chain` follows stored flow and needs no weights; `cotracker3` looks at the frames."""
    weights: str = ""
    """Checkpoint file or URL of the tracker; empty: the published weights of the ledger."""
    grid: int = 16
    """Tracks are started on grid x grid points of a frame."""
    start_frames: tuple[int, ...] = (0,)
    """Frames in which grids are started, tracked forwards and backwards. Negative ones count from the clip's end; in a
    clip without such a frame the nearest one is meant."""
    spread_starts: int = 0
    """Instead of start_frames: grids in this many frames, spread evenly from the first to the last; 0: off."""
    iters: int = 0
    """Refinements of cotracker3; 0 means the published 6."""
    num_actors: int = 0
    """Tracker actors; 0 means one per GPU or, without a GPU, as many as CPUs and memory allow."""
    threads_per_actor: int = 1
    """CPU threads each actor uses."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the tracker runs; `chain` always runs on the CPU."""
    allowed_quarantine: float = 0.05
    """Exit status 3 when more than this share of the clips was quarantined."""

    def __post_init__(self) -> None:
        _require(1 <= self.grid <= 1024, "grid", self.grid, "use 1 to 1024 points a side")
        _require(self.spread_starts >= 0, "spread_starts", self.spread_starts, "use 1 or more frames, or 0 for none")
        listed = bool(self.start_frames) or self.spread_starts > 0
        _require(listed, "start_frames", list(self.start_frames), "name at least one frame, or set spread_starts")
        _require(self.iters >= 0, "iters", self.iters, "use 1 or more, or 0 for the published number")
        _require(self.num_actors >= 0, "num_actors", self.num_actors, "use 1 or more, or 0 for what fits")
        _require(self.threads_per_actor >= 1, "threads_per_actor", self.threads_per_actor, "use 1 or more")
        _require(
            0 <= self.allowed_quarantine <= 1,
            "allowed_quarantine",
            self.allowed_quarantine,
            "use a share, 0 to 1",
        )


@dataclass(frozen=True)
class FlowFeatConfig:
    """The FlowFeat model and its loss (recipes: NeurIPS 2025, section 3 and supplement)."""

    variant: str = "dinov2_vits14_yt"
    """Hub name, such as dino_vits16_yt, mae_vitb16_kt or dinov2_vitb14_kt."""
    backbone_weights: str = ""
    """Checkpoint of the frozen encoder: file, URL, `published` (ledger) or empty (untrained, said aloud)."""
    resize: int = 448
    """Short side of the frame before the centre square crop."""
    crop: int = 224
    """Side of both training crops and of the teacher flow, in pixels."""
    crop_scale: tuple[float, float] = (0.5, 0.75)
    """Range of the crops' side relative to the square frame."""
    gap: int = 2
    """Largest distance between the frames of a pair; 1..gap and both signs are drawn when available."""
    time_flip: bool = True
    """Also learn from backward pairs (YouTube-VOS: on, Kinetics: off)."""
    ridge_alpha: float = 0.1
    """Regulariser of the linear map (YouTube-VOS 0.1, Kinetics 1.0)."""
    flow_weight: float = 0.1
    """Weight of the L1 flow loss."""
    edge_weight: float = 1.0
    """Weight of the edge loss."""
    edge_sigma: float = 0.1
    """Scale of the teacher gradient in the edge weights."""
    ema_decay: float = 0.999
    """Largest decay of the decoder's moving average; it warms up to it."""
    ema_every: int = 5
    """Optimizer steps between updates of the moving average."""

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        _require(0 < low <= high <= 1, "flowfeat.crop_scale", [low, high], "use 0 < low <= high <= 1")
        _require(
            self.resize >= self.crop >= 16,
            "flowfeat.resize",
            self.resize,
            f"use at least crop={self.crop} (>= 16)",
        )
        _require(self.gap >= 1, "flowfeat.gap", self.gap, "use 1 or more")
        _require(self.ridge_alpha > 0, "flowfeat.ridge_alpha", self.ridge_alpha, "use a positive number")
        _require(0 <= self.ema_decay < 1, "flowfeat.ema_decay", self.ema_decay, "use 0 <= decay < 1")
        _require(self.ema_every >= 1, "flowfeat.ema_every", self.ema_every, "use 1 or more steps")


@dataclass(frozen=True)
class FlowNetworkConfig:
    """Training of RAFT, SEA-RAFT (on stored flow) and SMURF (on frames alone)."""

    crop: tuple[int, int] = (368, 496)
    """Height and width of the training crops, in pixels of the stored flow."""
    gap: int = 1
    """Largest distance between the frames of a pair; all stored pairs up to it are drawn."""
    iters: int = 12
    """Refinements in training."""
    gamma: float = 0.8
    """Weight of a refinement relative to the next one (RAFT 0.8, SEA-RAFT 0.85)."""
    flip: float = 0.5
    """Probability of a left-right flip."""
    jitter: float = 0.2
    """Largest relative change of brightness and contrast."""
    visible_only: bool = False
    """Learn only from pixels that the stored occlusion calls visible (for flow of another teacher)."""
    freeze_batch_norm: bool = True
    """Keep the statistics of batch norms, as the published fine-tuning stages do."""
    smoothness: float = 2.0
    """SMURF: weight of second-order smoothness."""
    edge_constant: float = 150.0
    """SMURF: how fast image edges weaken smoothness."""
    self_supervision: float = 0.0
    """SMURF: weight of the loss against its own flow of the uncropped images (published: 0.3, ramped in late)."""
    self_supervision_crop: int = 64
    """SMURF: pixels cut off each side for that."""

    def __post_init__(self) -> None:
        _require(min(self.crop) >= 128, "flow_network.crop", list(self.crop), "use sides of 128 pixels or more")
        _require(self.gap >= 1, "flow_network.gap", self.gap, "use 1 or more")
        _require(self.iters >= 1, "flow_network.iters", self.iters, "use 1 or more")
        _require(0 < self.gamma <= 1, "flow_network.gamma", self.gamma, "use 0 < gamma <= 1")
        _require(0 <= self.flip <= 1, "flow_network.flip", self.flip, "use a probability, 0 to 1")
        _require(0 <= self.jitter < 1, "flow_network.jitter", self.jitter, "use 0 <= jitter < 1")
        for name, least in (
            ("smoothness", 0),
            ("edge_constant", 0),
            ("self_supervision", 0),
            ("self_supervision_crop", 1),
        ):
            value = getattr(self, name)
            _require(value >= least, f"flow_network.{name}", value, f"use {least} or more")
        if self.self_supervision:
            inner = min(self.crop) - 2 * self.self_supervision_crop
            rule = f"leaves {inner} pixels of the crop; it must leave 128"
            _require(inner >= 128, "flow_network.self_supervision_crop", self.self_supervision_crop, rule)


@dataclass(frozen=True)
class FPTConfig:
    """The Flow Poke Transformer: what it is shown, and its size (ICCV 2025, section 3 and supplement)."""

    preset: Literal["fpt_base", "fpt_tiny", "fpt_nano"] = "fpt_base"
    """The published model, or one that trains on a CPU."""
    encoder_weights: str = ""
    """Checkpoint the image encoder starts from: file, URL, `published` (ledger) or empty (untrained, said aloud)."""
    image_px: int = 512
    """Side of the square that the loader hands over; the encoder resizes it to its own."""
    gap_s: float = 1.0
    """Time from the shown frame to the end of the motion, in seconds (published: 25 frames)."""
    num_pokes: int = 128
    """Pokes of a sample; its queries are predicted from 0 to num_pokes - 1 of them."""
    queries_per_poke: int = 15
    """Queries predicted from each number of pokes."""
    min_tracks: int = 128
    """Fewest usable tracks of a start frame; num_pokes + queries_per_poke are needed in any case."""
    queries: Literal["unbiased", "published"] = "unbiased"
    """How queries are drawn: evenly from all tracks, or by the published rule, whose late ones are mostly known."""
    allow_overlap: bool = True
    """Whether a query may ask for a point whose motion is already known."""
    allow_invisible_ends: bool = True
    """Whether tracks count that are hidden at the end of the motion."""
    allow_out_of_frame_ends: bool = True
    """Whether tracks count that have left the square at the end of the motion."""
    static_flow: float = 0.01
    """Tracks that move less stand still, in units of the square's side."""
    static_share: float = 0.4
    """The camera is called static when more than this share of the tracks stands still."""
    pck_thresholds: tuple[float, float, float] = (0.01, 0.05, 0.1)
    """Errors up to which a predicted end counts as right in the logged PCK, in units of the square's side."""

    def __post_init__(self) -> None:
        _require(self.image_px >= 32, "fpt.image_px", self.image_px, "use 32 or more pixels")
        _require(self.gap_s > 0, "fpt.gap_s", self.gap_s, "use a positive number of seconds")
        _require(self.num_pokes >= 1, "fpt.num_pokes", self.num_pokes, "use 1 or more")
        _require(self.queries_per_poke >= 1, "fpt.queries_per_poke", self.queries_per_poke, "use 1 or more")
        _require(self.static_flow >= 0, "fpt.static_flow", self.static_flow, "use 0 or more")
        _require(0 <= self.static_share <= 1, "fpt.static_share", self.static_share, "use a share, 0 to 1")
        _require(min(self.pck_thresholds) > 0, "fpt.pck_thresholds", list(self.pck_thresholds), "use positive errors")


@dataclass(frozen=True)
class PairFilterConfig:
    """Which flow pairs are learned from, by the quality signals of `kinema teach`; -1 sets no limit."""

    min_motion_px: float = -1.0
    """Smallest mean motion of a pair, in pixels of the stored flow."""
    max_motion_px: float = -1.0
    """Largest mean motion."""
    max_consistency_px: float = -1.0
    """Largest median distance between a pixel and where it comes back to, forward and backward."""
    max_occluded_share: float = -1.0
    """Largest share of pixels that fail the forward-backward check."""
    max_photometric: float = -1.0
    """Largest mean difference of grey values (0..1) after warping."""
    max_uncertainty_px: float = -1.0
    """Largest mean error that the teacher itself expects."""
    max_disagreement_px: float = -1.0
    """Largest mean distance to the other teacher (`teach compare=`)."""
    skip_static: bool = False
    """Leave out pairs of equal pictures."""
    skip_cuts: bool = False
    """Leave out pairs whose flow explains nothing: cuts that were not found, or failures of the teacher."""

    def __post_init__(self) -> None:
        for name in ("max_occluded_share", "max_photometric"):
            _require(getattr(self, name) <= 1, f"loader.pairs.{name}", getattr(self, name), "use 0 to 1, or -1 for any")
        if self.max_motion_px >= 0:
            rule = f"use at most max_motion_px={self.max_motion_px}"
            fits = self.min_motion_px <= self.max_motion_px
            _require(fits, "loader.pairs.min_motion_px", self.min_motion_px, rule)


@dataclass(frozen=True)
class LoaderConfig:
    """How training samples are drawn. Order and content follow from the seed alone, not from the workers."""

    num_workers: int = 2
    """Loader processes per rank; 0 reads in the training process."""
    prefetch: int = 2
    """Batches each worker keeps ready."""
    samples_per_clip: int = 1
    """Samples taken from a clip each epoch while it is open, spread by the shuffle window."""
    shuffle_window: int = 256
    """Clips among which samples of the same clip are spread (only when samples_per_clip > 1). `fpt` reads and holds a
    whole window at a time: best the (global) batch size, or a small multiple of it."""
    min_motion: float = 0.0
    """Clips with a lower motion score are left out and counted."""
    skip_duplicates: bool = True
    """Clips marked as exact duplicates are left out and counted."""
    pairs: PairFilterConfig = field(default_factory=PairFilterConfig)
    """Which flow pairs are learned from."""

    def __post_init__(self) -> None:
        _require(self.num_workers >= 0, "loader.num_workers", self.num_workers, "use 0 or more")
        _require(self.prefetch >= 1, "loader.prefetch", self.prefetch, "use 1 or more")
        _require(self.samples_per_clip >= 1, "loader.samples_per_clip", self.samples_per_clip, "use 1 or more")
        _require(self.shuffle_window >= 1, "loader.shuffle_window", self.shuffle_window, "use 1 or more clips")


@dataclass(frozen=True)
class TrainConfig:
    """`kinema train`: clips/ + sidecars in, a run out."""

    clips: str = ""
    """The clips artifact."""
    flow: str = ""
    """The flow artifact of one teacher."""
    other_flow: tuple[str, ...] = ()
    """Flow artifacts of further teachers over the same clips; a clip is used when all have it."""
    flow_use: Literal["choose", "average"] = "choose"
    """With several teachers: draw one for every sample, or average their flow."""
    tracks: str = ""
    """The tracks artifact; `fpt` learns from it."""
    out: str = ""
    """Folder of the run: checkpoints and logs."""
    model: Literal["flowfeat", "raft", "raft_small", "sea_raft_s", "sea_raft_m", "sea_raft_l", "smurf", "fpt"] = (
        "flowfeat"
    )
    """Which model trains."""
    weights: str = ""
    """Checkpoint to start the model from (file or URL); empty: from initialisation."""
    flowfeat: FlowFeatConfig = field(default_factory=FlowFeatConfig)
    """Settings of the FlowFeat recipe."""
    flow_network: FlowNetworkConfig = field(default_factory=FlowNetworkConfig)
    """Settings of the flow networks' recipe."""
    fpt: FPTConfig = field(default_factory=FPTConfig)
    """Settings of the Flow Poke Transformer's recipe."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """How samples are drawn."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 128
    """Samples per optimizer step over all ranks; divisible by num_workers * accumulate."""
    accumulate: int = 1
    """Backward passes per optimizer step."""
    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moment decays."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    schedule: Literal["constant", "cosine", "poly", "linear"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of cosine, poly and linear schedules."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 means no clipping."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on GPU, fp32 on CPU."""
    seed: int = 0
    """Seed of initialisation, order and every random choice."""
    num_workers: int = 1
    """Ray Train workers (ranks)."""
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    """Whether each worker gets a GPU."""
    cpus_per_worker: float = 1.0
    """CPUs Ray reserves for each worker; threads follow it."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written at the end and at a stop signal."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    log_every: int = 10
    """Steps between metric points."""
    pictures_every: int = 500
    """Steps between pictures (input, teacher flow, predicted flow, feature PCA); 0 means only at the end."""
    max_failures: int = 3
    """Lost workers that are replaced before the run fails."""
    experiment: str = "kinema"
    """MLflow experiment."""
    run_name: str = ""
    """MLflow run name; empty: model and config hash."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "steps", self.steps, "use 1 or more")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "use 1 or more")
        _require(self.accumulate >= 1, "accumulate", self.accumulate, "use 1 or more")
        _require(self.num_workers >= 1, "num_workers", self.num_workers, "use 1 or more ranks")
        _require(self.lr > 0, "lr", self.lr, "use a positive rate")
        _require(self.clip_norm >= 0, "clip_norm", self.clip_norm, "use a positive norm, or 0 for none")
        _require(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, "use 1 or more steps")
        _require(self.keep_checkpoints >= 1, "keep_checkpoints", self.keep_checkpoints, "use 1 or more")
        _require(self.log_every >= 1, "log_every", self.log_every, "use 1 or more steps")
        rule = "it takes several teachers; name the others' flow: other_flow=[DIR]"
        _require(self.flow_use == "choose" or bool(self.other_flow), "flow_use", self.flow_use, rule)
        world = self.num_workers * self.accumulate
        if self.batch_size % world:
            low, high = self.batch_size // world * world, -(-self.batch_size // world) * world
            sizes = f"{low} or {high}" if low else f"{high}"
            rule = f"is not divisible by num_workers * accumulate = {world}"
            raise ValueError(f"batch_size={self.batch_size} {rule}; use {sizes}")


@dataclass(frozen=True)
class PokesConfig:
    """Benchmarks `pokes` and `moving_part` of a Flow Poke Transformer."""

    gap_s: float = 0.0
    """Time from the shown frame to the end of the motion, in seconds; 0: the trained run's own (1 s for names)."""
    counts: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 50, 100)
    """Numbers of pokes; those that under half of the clips have tracks for are left out."""
    num_queries: int = 64
    """Points of a clip whose motion is asked for; the same for every number of pokes, and never pokes."""
    draws_per_clip: int = 1
    """Samples (start frame, pokes, queries) of each clip."""
    max_clips: int = 0
    """Clips to evaluate, spread over all; 0 means every clip."""
    pck_thresholds: tuple[float, float, float] = (0.01, 0.05, 0.1)
    """Errors up to which a predicted motion counts as right, in units of the square's side."""
    side_px: int = 512
    """End-point errors are in pixels of the square at this side."""
    grid: int = 48
    """Moving part: the effect of a poke is asked for at grid x grid points of the square."""
    threshold_nats: float = 0.0
    """Moving part: divergence from which a point moves along; 0: chosen on the tuning half of the images."""
    num_scenes: int = 16
    """Moving part, data=scenes: scenes to render."""
    batch_size: int = 8
    """Clips, or pokes of an image, per network call."""
    num_examples: int = 4
    """Pictures of examples."""
    seed: int = 0
    """Seed of every draw."""

    def __post_init__(self) -> None:
        _require(self.gap_s >= 0, "pokes.gap_s", self.gap_s, "use a positive number of seconds, or 0")
        rule = "use increasing numbers, at least one above 0"
        increasing = list(self.counts) == sorted(set(self.counts)) and bool(self.counts)
        _require(increasing and self.counts[0] >= 0 < self.counts[-1], "pokes.counts", list(self.counts), rule)
        _require(min(self.pck_thresholds) > 0, "pokes.pck_thresholds", list(self.pck_thresholds), "use positive errors")
        _require(self.threshold_nats >= 0, "pokes.threshold_nats", self.threshold_nats, "use 0 or more nats")
        for name in ("num_queries", "draws_per_clip", "side_px", "batch_size"):
            _require(getattr(self, name) >= 1, f"pokes.{name}", getattr(self, name), "use 1 or more")
        for name in ("grid", "num_scenes"):
            _require(getattr(self, name) >= 2, f"pokes.{name}", getattr(self, name), "use 2 or more")
        for name in ("max_clips", "num_examples", "seed"):
            _require(getattr(self, name) >= 0, f"pokes.{name}", getattr(self, name), "use 0 or more")


@dataclass(frozen=True)
class EvaluateConfig:
    """`kinema evaluate`: a model and a benchmark folder in, one table out."""

    model: str = ""
    """Run folder, checkpoint, registry URI (models:/...) or a flow network's name (dis, raft, sea_raft_m, ...)
    or a tracker's (chain, cotracker3) or a Flow Poke Transformer's (fpt_base)."""
    weights: str = ""
    """Weights for a flow network, tracker or FlowFeat variant given by name; for chain, those of its teacher."""
    benchmark: Literal["davis", "sintel", "kitti", "middlebury", "tapvid", "pokes", "moving_part"] = "davis"
    """Which measures."""
    data: str = ""
    """The benchmark's folder; TAP-Vid: also a file; TAP-Vid and moving_part: also `scenes`, rendered with known motion.
    """
    clips: str = ""
    """Benchmark pokes: a clips artifact that the model was not trained on."""
    tracks: str = ""
    """Benchmark pokes: the tracks artifact of these clips."""
    out: str = ""
    """Folder for the table (JSON, CSV) and pictures; empty: nothing is written."""
    protocols: tuple[Literal["mlp", "propagation", "attention"], ...] = ("mlp",)
    """DAVIS: FlowFeat's MLP, DINO's label propagation, attention probe."""
    sequences: tuple[str, ...] = ()
    """DAVIS sequences; empty means all found."""
    features: Literal["y_dec", "y_enc"] = "y_dec"
    """Which features are evaluated."""
    short_side: int = 480
    """Shorter side of the frames that label propagation compares."""
    iters: int = 0
    """Refinement iterations; 0 means the benchmark's usual number (Sintel 32, KITTI 24, CoTracker3 6)."""
    scale: int = 0
    """SEA-RAFT sees the images at 2^scale times their size."""
    queries: Literal["first", "strided"] = "first"
    """TAP-Vid: points are given where they are first seen, or in every 5th frame in which they are seen."""
    teacher: Literal["dis", "raft", "raft_small", "sea_raft_s", "sea_raft_m", "sea_raft_l", "smurf"] = "dis"
    """TAP-Vid: the flow network that chain follows."""
    single_queries: bool = False
    """TAP-Vid, cotracker3: each query in a run of its own with a local grid, as in the paper's tables, which takes
    as many times longer as there are queries; otherwise all queries of a video in one run."""
    pokes: PokesConfig = field(default_factory=PokesConfig)
    """Benchmarks pokes and moving_part: how they ask."""
    run_id: str = ""
    """MLflow run that gets the table; empty: the model's own run if it has one."""


@dataclass(frozen=True)
class RegisterConfig:
    """`kinema register`: a run in, a registry version out."""

    model: str = ""
    """Run folder or checkpoint."""
    name: str = "kinema-flowfeat"
    """Registered model name."""
    metric: str = ""
    """Metric that decides about `champion`, for example davis_jf; empty: the first of the evaluation."""
    higher_is_better: bool = True
    """Direction of the metric."""

    def __post_init__(self) -> None:
        rule = "use a name without / and :, for example kinema-flowfeat"
        _require(bool(self.name) and not set(self.name) & set("/:"), "name", self.name, rule)


@dataclass(frozen=True)
class EmbedConfig:
    """`kinema embed`: a registry model and clips/ in, features/ out."""

    model: str = "models:/kinema-flowfeat@champion"
    """Registry URI, run folder or checkpoint."""
    clips: str = ""
    """The clips artifact."""
    out: str = ""
    """Folder or URL of the features artifact."""
    features: Literal["y_dec", "y_enc", "pooled"] = "pooled"
    """Dense decoder or encoder maps, or their mean over the frame."""
    frame_stride: int = 12
    """Every how many frames one is embedded."""
    short_side: int = 224
    """Frames are resized to this shorter side (rounded to the patch size)."""
    batch_frames: int = 8
    """Frames per network call."""
    num_actors: int = 0
    """Actors; 0 means one per GPU, or one per two CPUs without a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    allowed_quarantine: float = 0.05
    """Exit status 3 when more than this share of the clips was quarantined."""

    def __post_init__(self) -> None:
        _require(self.frame_stride >= 1, "frame_stride", self.frame_stride, "use 1 or more")
        _require(self.batch_frames >= 1, "batch_frames", self.batch_frames, "use 1 or more")
        _require(self.short_side >= 16, "short_side", self.short_side, "use 16 or more pixels")


@dataclass(frozen=True)
class WorkflowConfig:
    """`kinema run`: all stages in order. Paths left empty are filled in under `workspace`."""

    name: str = "workflow"
    """Name of the parent MLflow run."""
    workspace: str = "workspace"
    """Folder under which stages write unless told otherwise."""
    stages: tuple[Literal["shard", "teach", "track", "train", "evaluate", "register", "embed"], ...] = (
        "shard",
        "teach",
        "train",
        "register",
        "embed",
    )
    """Stages to run."""
    shard: ShardConfig = field(default_factory=ShardConfig)
    """Section of `kinema shard`."""
    teach: TeachConfig = field(default_factory=TeachConfig)
    """Section of `kinema teach`."""
    track: TrackConfig = field(default_factory=TrackConfig)
    """Section of `kinema track`."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Section of `kinema train`."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Section of `kinema evaluate`."""
    register: RegisterConfig = field(default_factory=RegisterConfig)
    """Section of `kinema register`."""
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    """Section of `kinema embed`."""


@dataclass(frozen=True)
class PageConfig:
    """`kinema demo fpt`: the Flow Poke Transformer on a page in your browser."""

    model: str = "fpt_base"
    """`fpt_base` or `fpt_tiny` with weights=, or a run folder, checkpoint or registry URI (models:/...)."""
    weights: str = ""
    """Checkpoint file or URL for fpt_base or fpt_tiny; `published` downloads; empty: random weights."""
    clips: str = ""
    """A clips artifact whose frames can be chosen on the page."""
    port: int = 0
    """Port on 127.0.0.1; 0 takes a free one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    grid: int = 32
    """Points a side of dense pictures; while a poke is dragged, as many as a quarter of a second allows."""
    cached_images: int = 4
    """Images that stay embedded; one takes 80 MB with fpt_base."""
    max_upload_mb: float = 10.0
    """Largest picture file, in millions of bytes."""
    max_megapixels: float = 40.0
    """Largest picture, in millions of pixels."""

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, "port", self.port, "use 1024 to 65535, or 0 for a free one")
        _require(4 <= self.grid <= 64, "grid", self.grid, "use 4 to 64 points a side")
        _require(self.cached_images >= 1, "cached_images", self.cached_images, "use 1 or more")
        _require(self.max_upload_mb > 0, "max_upload_mb", self.max_upload_mb, "use a positive number")
        _require(self.max_megapixels > 0, "max_megapixels", self.max_megapixels, "use a positive number")


STAGES: dict[str, Any] = {
    "shard": ShardConfig,
    "teach": TeachConfig,
    "track": TrackConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "register": RegisterConfig,
    "embed": EmbedConfig,
    "run": WorkflowConfig,
}
