"""Label propagation against the published numbers, and its rules on made-up features."""

import numpy as np
import pytest
import torch

from kinema.pipelines.evaluate.davis import propagation
from kinema.pipelines.evaluate.davis.propagation import PropagationSettings


@pytest.mark.parametrize(("name", "objects"), [("dino_propagation__s0", 2), ("dino_propagation__s1_variant", 3)])
def test_masks_equal_the_published_ones(name, objects, fill, golden):
    reference = golden(name)
    meta, seed = reference.meta, reference.meta["seed"]
    settings = PropagationSettings(
        meta["settings"]["n_last_frames"],
        meta["settings"]["size_mask_neighborhood"],
        meta["settings"]["topk"],
        meta["settings"]["temperature"],
    )
    maps = [
        (1 + 0.2 * t)
        * (fill.image(seed, "feat", 1, 28, 34, channels=16, shift=(0.8 * t, -0.5 * t), zoom=1 + 0.01 * t)[0] - 0.5)
        for t in range(6)
    ]
    drawn = fill.image(seed, "mask", 1, 28, 34, channels=objects)[0].numpy()
    labels = np.zeros((28, 34), np.uint8)
    for k in range(objects):
        labels[drawn[k] > 0.72] = k + 1
    one_hot = propagation.first_mask(labels, 28, 34)
    reference.check("first_mask_onehot", one_hot[None], atol=0, rtol=0)
    soft = list(propagation.propagate(maps[0], maps[1:], one_hot, settings))
    reference.check("soft_masks", torch.stack(soft), atol=1e-5, rtol=0)
    size = tuple(meta["inputs"]["output_size_h_w"])
    final = np.stack([propagation.final_labels(mask, (28 * 8, 34 * 8), size) for mask in soft])
    spec = meta["arrays"]["labels_full_resolution"]
    stored = reference.data["labels_full_resolution"].reshape(-1)
    assert (final.reshape(-1)[:: spec["stride"]] != stored).mean() <= 1e-3
    histogram = np.stack([np.bincount(f.reshape(-1), minlength=objects + 1) for f in final])
    assert np.abs(histogram - reference.data["labels_histogram"]).max() <= 1e-3 * final[0].size


@pytest.mark.parametrize("radius", [0, 3])
@pytest.mark.parametrize("size", [(5, 7), (19, 23)])
def test_tiles_equal_the_whole_affinity(size, radius):
    """Against the definition written out over all pairs of cells."""
    torch.manual_seed(0)
    height, width = size
    unit = torch.nn.functional.normalize(torch.randn(4, 6, height, width), dim=1)
    target, sources = unit[0], unit[1:]
    masks = torch.rand(3, 2, height, width)
    settings = PropagationSettings(radius=radius, top_k=4)
    found = propagation.propagate_step(target, sources, masks, settings)
    affinity = (torch.einsum("chw,sckl->hwskl", target, sources) / 0.1).exp()
    y, x = torch.arange(height), torch.arange(width)
    if radius:
        rows = ((y[:, None] - y).abs() <= radius).float()
        columns = ((x[:, None] - x).abs() <= radius).float()
        affinity = affinity * rows[:, None, None, :, None] * columns[None, :, None, None, :]
    flat = affinity.flatten(2)
    flat = flat * (flat >= flat.topk(4).values[..., -1:])
    flat = flat / flat.sum(-1, keepdim=True)
    expected = torch.einsum("hwn,nk->khw", flat, masks.transpose(0, 1).flatten(1).T)
    assert torch.allclose(found, expected, atol=1e-5)


def test_ties_all_pass_on_their_labels():
    """Two identical earlier frames with different labels count half each."""
    feature = torch.nn.functional.normalize(torch.randn(6, 4, 4), dim=0)
    masks = torch.zeros(2, 2, 4, 4)
    masks[0, 0], masks[1, 1] = 1, 1
    soft = propagation.propagate_step(feature, torch.stack([feature, feature]), masks, PropagationSettings(top_k=1))
    assert torch.allclose(soft, torch.full((2, 4, 4), 0.5))


def test_an_object_that_vanished_leaves_the_background():
    soft = torch.zeros(2, 4, 4)
    soft[0] = 1
    assert (propagation.final_labels(soft, (32, 32), (30, 40)) == 0).all()


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(480, 854, (480, 832)), (854, 480, (832, 480)), (500, 500, (480, 448)), (1080, 1920, (480, 832))],
)
def test_frame_sizes_of_the_protocol(height, width, expected):
    assert propagation.frame_size(height, width) == expected


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="top_k from 1"):
        PropagationSettings(top_k=0)
