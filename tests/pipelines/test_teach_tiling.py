"""Tiles cover the frame, and their blend is the whole."""

import numpy as np
import pytest
import torch

from kinema.pipelines.teach.protocol import FlowEstimate
from kinema.pipelines.teach.tiling import TiledTeacher, tile_grid


@pytest.mark.parametrize(
    "height, width, max_pixels", [(300, 400, 40000), (1080, 1920, 500000), (131, 3001, 20000), (129, 129, 16641)]
)
def test_tiles_cover_the_frame_and_overlap(height, width, max_pixels):
    tiles = tile_grid(height, width, max_pixels)
    covered = np.zeros((height, width), int)
    for tile in tiles:
        assert tile.height * tile.width <= max_pixels
        assert 0 <= tile.top <= height - tile.height and 0 <= tile.left <= width - tile.width
        covered[tile.window] += 1
    assert covered.min() >= 1
    lefts = sorted({tile.left for tile in tiles})
    for left, following in zip(lefts, lefts[1:], strict=False):
        assert left + tiles[0].width - following >= 0.2 * tiles[0].width


def test_a_frame_that_fits_is_one_tile_and_a_tiny_limit_is_refused():
    assert len(tile_grid(200, 300, 60000)) == 1
    with pytest.raises(ValueError, match="too small for a flow network"):
        tile_grid(200, 300, 1000)


class Positions:
    """Says of each pixel the value that the frame has there."""

    def features(self, frame):
        return torch.from_numpy(frame.copy()).permute(2, 0, 1).float()

    def flow(self, pairs):
        flow = torch.stack([first[:2] for first, _ in pairs])
        return FlowEstimate(flow, torch.stack([second[2] for _, second in pairs]))


def test_tiles_are_blended_without_a_seam():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (3, 301, 407, 3), dtype=np.uint8)
    teacher = TiledTeacher(Positions(), 40000, lambda height, width: (height, width))
    features = [teacher.features(frame) for frame in frames]
    flow, uncertainty = teacher.flow([(features[0], features[1]), (features[1], features[2])])
    np.testing.assert_allclose(flow.numpy(), frames[:2, ..., :2].transpose(0, 3, 1, 2), atol=1e-3)
    np.testing.assert_allclose(uncertainty.numpy(), frames[1:, ..., 2], atol=1e-3)
