"""What the renderer makes, from the settings `rendered.*`."""

from __future__ import annotations

import numpy as np

from kinema.configs.rendered import RenderedConfig
from kinema.pipelines.artifacts import Artifact, read_range
from kinema.pipelines.scenes.rendered.settings import SPEED_EDGES_PX, RenderSettings, log_normal_shares
from kinema.pipelines.scenes.rendered.statistics import flow_shares, matched
from kinema.pipelines.sidecars.flow_codec import FlowBlob
from kinema.pipelines.sidecars.sidecar import open_input

_MATCHED_PAIRS = 200


def render_settings(config: RenderedConfig, textures: str = "") -> RenderSettings:
    """The renderer's settings. Raises: ValueError for a flow artifact to match that has no motion."""
    settings = RenderSettings(
        height=config.height,
        width=config.width,
        num_frames=config.num_frames,
        objects=config.objects,
        speed_shares=log_normal_shares(config.speed_px, config.speed_spread, config.longest_px),
        homography=config.homography,
        thin_plate=config.thin_plate,
        textures=textures,
        detail=config.detail,
        effects=config.effects,
    )
    if not config.match:
        return settings
    return matched(settings, artifact_shares(open_input(config.match, "flow", setting="rendered.match")))[0]


def artifact_shares(flow: Artifact) -> np.ndarray:
    """The histogram of motion of a flow artifact, from at most 200 of its pairs, spread over all."""
    rows = flow.samples(["shard", "flow_offset", "flow_size", "num_pairs"]).to_pylist()
    total = np.zeros(len(SPEED_EDGES_PX) - 1)
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MATCHED_PAIRS)).astype(int))
    for number in chosen:
        row = rows[number]
        blob = FlowBlob(read_range(flow.shard_url(row["shard"]), row["flow_offset"], row["flow_size"]))
        for t, gap in blob.pairs[: max(1, _MATCHED_PAIRS // len(chosen))]:
            total += flow_shares(blob.flow(t, gap), gap)
    return total
