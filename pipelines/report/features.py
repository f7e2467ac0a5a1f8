"""Pictures of stored features: main components on one basis over all frames, and nearest patches to a clicked one."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
import torch
from einops import rearrange

from kinema.pipelines.artifacts import Artifact, read_range
from kinema.pipelines.loader import ClipIndex
from kinema.pipelines.pictures.projection import Projection
from kinema.pipelines.report.page import Page
from kinema.pipelines.report.variety import caption_of, spread, varied

PATCHES_ALONG = 24
PICTURE_WIDTH = 340
MAX_CLIPS, FRAMES_PER_CLIP = 6, 4
SHOWN_WIDTH = 290
"""Pixels of the page; four fit beside one another."""
WIDTH_KEPT = 48
"""Main components of a feature that the page carries for nearest patches."""


def add_features(page: Page, features: Artifact, clips_url: str | None) -> None:
    """Figures of a features artifact, and pictures of its maps where it has maps and the clips are there."""
    rows = features.samples().to_pylist()
    page.numbers(
        {
            "clips": len(rows),
            "frames": sum(len(row["frames"]) for row in rows),
            "shards": len(features.commits()),
            "MB": round(sum(record["bytes"] for record in features.commits().values()) / 1e6, 1),
        }
    )
    if not rows:
        return
    dense = next((name for name in ("y_dec", "y_enc") if rows[0].get(_column(name)) is not None), "")
    pooled = features.manifest["config"].get("features") == "pooled"
    if pooled or not dense or clips_url is None:
        why = "Means over frames only" if pooled else "The clips were not found beside these features"
        page.text(f"{why}, so there are no maps to show; `kinema embed features=y_dec` stores maps.")
        _add_means(page, rows)
        return
    _add_maps(
        page, features, {row["key"]: row for row in rows}, dense, ClipIndex.open(clips_url, skip_duplicates=False)
    )


def _add_maps(page: Page, features: Artifact, rows: dict[str, Any], dense: str, index: ClipIndex) -> None:
    shown: list[tuple[np.ndarray, str]] = []
    maps: list[torch.Tensor] = []
    firsts: list[int] = []

    keys = index.keys
    for number in varied(index, MAX_CLIPS):
        row = rows.get(keys[number])
        if row is None:
            continue
        stored = _read(features, row, dense)
        firsts.append(len(shown))
        for i in spread(len(row["frames"]), FRAMES_PER_CLIP):
            frame = index.clip(number).frames([row["frames"][i]])[0]
            shown.append((frame, f"{caption_of(index.clip(number))}, frame {row['frames'][i]}"))
            maps.append(torch.from_numpy(stored[i]))
    if not maps:
        return
    basis = Projection.of(maps)
    page.section("Main components", "The same colour means the same feature in every picture.")
    for first, end in zip(firsts, [*firsts[1:], len(shown)], strict=True):
        frames, components = [], []
        for (frame, caption), one in zip(shown[first:end], maps[first:end], strict=True):
            size = _size(frame)
            frames.append((cv2.resize(frame, size, interpolation=cv2.INTER_AREA), caption))
            components.append((cv2.resize(basis.picture(one), size, interpolation=cv2.INTER_NEAREST), dense))
        page.pictures(frames, width=SHOWN_WIDTH)
        page.pictures(components, width=SHOWN_WIDTH)
    page.section("Nearest patches", "Which patches have features like the one that is clicked.")
    page.patches(*_patches([shown[i] for i in firsts], [maps[i] for i in firsts]))


def _patches(shown: list[tuple[np.ndarray, str]], maps: list[torch.Tensor]) -> tuple[list[Any], np.ndarray]:
    """Square pictures, and the centred features of their patches in their main components."""
    side = PATCHES_ALONG
    small = torch.stack(
        [torch.nn.functional.adaptive_avg_pool2d(m.float()[None], side)[0] for m in maps]
    )  # [N, C, s, s]
    pixels = rearrange(small, "n c h w -> (n h w) c")
    centred = pixels - pixels.mean(dim=0)
    _, vectors = torch.linalg.eigh((centred.T @ centred).double())
    kept = centred @ vectors.flip(1)[:, :WIDTH_KEPT].float()
    pictures = [(cv2.resize(frame, (PICTURE_WIDTH, PICTURE_WIDTH * 3 // 4)), caption) for frame, caption in shown]
    return pictures, rearrange(kept, "(n h w) c -> n h w c", h=side, w=side).numpy()


def _add_means(page: Page, rows: list[dict[str, Any]]) -> None:
    means = np.array([row["y_dec_mean"] for row in rows], dtype=np.float32)
    if len(means) > 2:
        centred = means - means.mean(axis=0)
        _, values, _ = np.linalg.svd(centred, full_matrices=False)
        share = values**2 / max(float((values**2).sum()), 1e-12)
        page.line_chart(
            {"share": (list(range(1, len(share) + 1)), np.cumsum(share).tolist())}, "components", "variance"
        )


def _column(name: str) -> str:
    return f"{name}_offset"


def _read(features: Artifact, row: dict[str, Any], name: str) -> np.ndarray:
    """Maps [T, C, h, w] of a clip as float32, whatever they are stored as."""

    def member(which: str) -> np.ndarray:
        data = read_range(features.shard_url(row["shard"]), row[f"{which}_offset"], row[f"{which}_size"])
        return np.load(io.BytesIO(data), allow_pickle=False)

    maps = member(name).astype(np.float32)
    scaled = row.get(_column(f"{name}_scale")) is not None
    return maps * member(f"{name}_scale")[:, None, None] if scaled else maps


def _size(frame: np.ndarray) -> tuple[int, int]:
    return PICTURE_WIDTH, round(frame.shape[0] * PICTURE_WIDTH / frame.shape[1])
