"""Frames and exact flow as one sample of a clips artifact and one of a flow artifact, in the formats of videos.

Images are coded without loss (H.264 at quantiser 0 in RGB), so clips decode to the very pixels. Flow is stored in
steps of 1/64 px: exact for KITTI and HD1K, which are published in such steps, otherwise off by at most 1/128 px (a
field that reaches beyond 512 px: 1/32 px). Pixels without known flow stay without (nan).
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import UInt8

from kinema.configs.json_text import json_text
from kinema.configs.shard import ClipConfig
from kinema.pipelines.shard.build import ROWS
from kinema.pipelines.shard.runs import THUMBNAIL_SIDE
from kinema.pipelines.sidecars.flow_codec import FlowBlob, FlowPair, encode_clip_flow
from kinema.pipelines.sidecars.sidecar import Sample
from kinema.pipelines.teach import quality
from kinema.pipelines.teach.shard_teacher import FLOW_COLUMNS
from kinema.pipelines.video.encode import ClipEncoder
from kinema.pipelines.video.motion import MOTION, is_measured
from kinema.pipelines.video.orient import Orientation
from kinema.pipelines.video.packets import packet_table
from kinema.pipelines.video.picture import PictureMaker, picture_spec
from kinema.pipelines.video.signature import clip_signature, frame_signature, perceptual_hash

TEACHER = "truth"
"""What a flow artifact of known flow names as its teacher."""
CLIP_COLUMNS = ROWS
TRUTH_COLUMNS = pa.schema(
    [
        *FLOW_COLUMNS,
        pa.field("known_share", pa.float64()),
        pa.field("num_unstorable", pa.int64()),
    ]
)
"""Columns of the flow artifact: those of `teach`, the share of pixels with known flow, and how many moved too far."""


@dataclass(frozen=True)
class ClipFacts:
    """What is said of a clip besides its frames."""

    key: str
    source: str
    source_hash: str
    frame_numbers: tuple[int, ...]
    labels: dict[str, Any]
    fps: Fraction


def clip_sample(
    facts: ClipFacts, images: Sequence[UInt8[np.ndarray, "H W 3"]], clip: ClipConfig, motion: str
) -> Sample:
    """Members and row of the clips artifact."""
    height, width = images[0].shape[:2]
    mp4, pix_fmt = _encode(images, clip, facts.fps)
    table = packet_table(mp4)
    small = [_thumbnail(image) for image in images]
    measure = MOTION[motion]()
    for index, picture in enumerate(small):
        if is_measured(index):
            measure.add(picture)
    score = measure.score()
    phash = perceptual_hash(clip_signature(np.stack([frame_signature(picture) for picture in small])))
    shared = {
        "source": facts.source,
        "source_hash": facts.source_hash,
        "shot": 0,
        "clip": facts.frame_numbers[0],
        "start_s": float(facts.frame_numbers[0] / facts.fps),
        "end_s": float((facts.frame_numbers[-1] + 1) / facts.fps),
        "num_frames": len(images),
        "width": width,
        "height": height,
        "rotation": 0,
        "codec": clip.codec,
        "motion_score": None if score is None else round(score, 8),
        "duplicate_of": None,
        "near_duplicate_of": None,
    }
    meta = shared | {
        "key": facts.key,
        "pts": list(facts.frame_numbers),
        "time_base": [facts.fps.denominator, facts.fps.numerator],
        "fps": [facts.fps.numerator, facts.fps.denominator],
        "padding": [0, 0],
        "mirrored": False,
        "gop": clip.gop,
        "pix_fmt": pix_fmt,
        "color": {"matrix": 0, "range": 2, "primaries": 2, "transfer": 2},
        "source_facts": {"container": "images", "codec": "images", "stored_width": width, "stored_height": height},
        "phash": f"{phash:016x}",
        "has_masks": False,
        "sha256": hashlib.sha256(mp4).hexdigest(),
        "labels": facts.labels,
    }
    row = shared | {
        "fps_num": facts.fps.numerator,
        "fps_den": facts.fps.denominator,
        "phash": phash,
        "labels": json_text(facts.labels, sort_keys=True, ensure_ascii=False),
        "masks_offset": 0,
        "masks_size": 0,
        "extradata": table.extradata,
        "packet_offset": table.offset,
        "packet_size": table.size,
        "packet_frame": table.frame,
        "packet_keyframe": table.keyframe,
    }
    text = json_text(meta, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return {"mp4": mp4, "json": text.encode()}, row


def flow_sample(
    facts: ClipFacts,
    images: Sequence[UInt8[np.ndarray, "H W 3"]],
    flows: Iterable[tuple[FlowPair, int]],
    weights_hash: str = "none",
) -> Sample:
    """Members and row of the flow artifact.

    Args: flows, pairs and how many of their pixels could not be stored; weights_hash, of what made the flow.
    """
    height, width = images[0].shape[:2]
    greys = [torch.from_numpy(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[None].float() / 255 for image in images]
    signals: list[quality.PairQuality] = []
    known: list[float] = []
    num_unstorable = 0

    def pairs() -> Iterable[FlowPair]:
        nonlocal num_unstorable
        for pair, unstorable in flows:
            num_unstorable += unstorable
            flow_px = pair.flow_px
            if pair.valid is not None:
                known.append(float(pair.valid.mean()))
                flow_px = np.where(pair.valid, flow_px, np.float32(np.nan))
            flow = torch.from_numpy(np.ascontiguousarray(flow_px))
            signal = quality.pair_quality(pair.t, pair.gap, greys[pair.t], greys[pair.t + pair.gap], flow)
            hidden = None if pair.occlusion is None else float(pair.occlusion.mean())
            signals.append(replace(signal, occluded_share=hidden, cut=False))  # the truth explains every pair
            yield pair

    blob = encode_clip_flow(
        pairs(), height=height, width=width, teacher=TEACHER, weights_hash=weights_hash, frames=len(images)
    )
    columns = quality.columns(signals)
    row = {
        "source": facts.source,
        "height": height,
        "width": width,
        "num_frames": len(images),
        "num_pairs": len(signals),
        "teacher": TEACHER,
        "weights_hash": weights_hash,
        "num_saturated": FlowBlob(blob).num_saturated,
        "mean_flow_px": _mean(columns["pair_motion_px"]),
        "occluded_share": _mean(columns["pair_occluded_share"]),
        "known_share": _mean(known) if known else 1.0,
        "num_unstorable": num_unstorable,
        **columns,
    }
    return {"flow": blob}, row


def _encode(images: Sequence[UInt8[np.ndarray, "H W 3"]], clip: ClipConfig, fps: Fraction) -> tuple[bytes, str]:
    """The mp4 of a clip, and the pixel format of its pictures."""
    frames = (av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24") for image in images)
    first = next(frames)
    spec = picture_spec(first, Orientation(), clip.codec, 0)
    maker = PictureMaker(spec)
    with ClipEncoder(clip, spec, fps) as encoder:
        for frame in itertools.chain([first], frames):
            encoder.add(maker.make(frame))
        return encoder.finish(), spec.pix_fmt


def _thumbnail(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """BGR with a short side of THUMBNAIL_SIDE at most."""
    scale = min(1.0, THUMBNAIL_SIDE / min(image.shape[:2]))
    size = max(8, round(image.shape[1] * scale)), max(8, round(image.shape[0] * scale))
    return np.ascontiguousarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA)[..., ::-1])


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(found) / len(found) if found else None
