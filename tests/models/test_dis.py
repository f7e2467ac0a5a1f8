"""DIS: known motion, real accuracy, sizes, determinism, errors."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from kinema.models.flow.dis import DIS
from kinema.pipelines.sidecars.flow_files import read_flow


@pytest.mark.parametrize("preset", ["ultrafast", "fast", "medium"])
def test_finds_a_known_shift_in_every_image_of_a_batch(fill, preset):
    first = torch.cat([fill.image(0, "dis", 1, 97, 131), fill.image(1, "dis", 1, 97, 131)])
    second = torch.cat(
        [
            fill.image(0, "dis", 1, 97, 131, shift=(3.0, -2.0)),
            fill.image(1, "dis", 1, 97, 131, shift=(-1.5, 4.0)),
        ]
    )
    flow = DIS(preset)(first, second)
    assert flow.shape == (2, 2, 97, 131) and flow.dtype == torch.float32
    middle = flow[..., 20:-20, 20:-20].flatten(2).median(2).values
    assert torch.allclose(middle, torch.tensor([[3.0, -2.0], [-1.5, 4.0]]), atol=0.2)


def test_accuracy_on_rubber_whale(shared_data):
    folder = shared_data / "flow" / "middlebury"
    images = [
        torch.from_numpy(np.array(Image.open(folder / f"RubberWhale{n}.png"))).permute(2, 0, 1)[None] / 255
        for n in (1, 2)
    ]
    flow = DIS()(*images)[0].numpy()
    error = np.sqrt(((flow - read_flow(folder / "RubberWhale_flow10.flo")) ** 2).sum(0))
    assert np.nanmean(error) == pytest.approx(0.22, abs=0.01)


@pytest.mark.parametrize("size", [(1, 1), (9, 40), (12, 300), (33, 65), (20, 1000)])
@pytest.mark.parametrize("preset", ["ultrafast", "medium"])
def test_small_and_thin_images_work(size, preset):
    image = torch.rand(1, 3, *size)
    flow = DIS(preset)(image, image)
    assert flow.shape == (1, 2, *size) and flow.abs().max() < 0.5


def test_the_thread_count_does_not_change_the_result(fill):
    first = fill.image(3, "dis", 1, 120, 200)
    second = fill.image(3, "dis", 1, 120, 200, shift=(5.0, 1.0), zoom=1.05)
    threads = cv2.getNumThreads()
    flows = []
    for count in (1, 2, 5):
        cv2.setNumThreads(count)
        flows.append(DIS()(first, second))
    cv2.setNumThreads(threads)
    assert torch.equal(flows[0], flows[1]) and torch.equal(flows[0], flows[2])


def test_has_no_weights_and_refuses_what_it_cannot_do():
    image = torch.rand(1, 3, 40, 40)
    assert DIS().state_dict() == {}
    with pytest.raises(ValueError, match="preset='slow'"):
        DIS("slow")
    with pytest.raises(ValueError, match="flow_init"):
        DIS()(image, image, flow_init=torch.zeros(1, 2, 5, 5))
    with pytest.raises(ValueError, match="one size"):
        DIS()(image, image[..., 1:])
    with pytest.raises(ValueError, match="negative"):
        DIS()(image, image, iters=-1)
