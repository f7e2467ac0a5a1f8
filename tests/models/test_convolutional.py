"""The encoder that learns from scratch: sizes, gradients, and that a few steps on one motion teach it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kinema.kernels import local_correlation
from kinema.models.backbones.convolutional import PYRAMIDS, CellConfig, CellEncoder, PyramidEncoder
from kinema.models.dinoflow import FlowModel, FlowModelConfig
from kinema.models.flowfeat.model import FlowFeat
from kinema.models.flowfeat.training import FlowFeatLossConfig, FlowFeatTraining, random_crop_matrix


@pytest.mark.parametrize("size", [(64, 64), (37, 53), (96, 40)])
def test_maps_and_features_of_any_size(size):
    height, width = size
    encoder = PyramidEncoder(PYRAMIDS["conv_small"])
    maps = encoder(torch.randn(2, 3, *size))
    expected = [(-(-height // 2**k), -(-width // 2**k)) for k in (2, 3, 4, 5)]
    assert [tuple(m.shape[-2:]) for m in maps] == expected and [m.shape[1] for m in maps] == [32, 64, 96, 128]
    y_enc, y_dec = FlowFeat("conv_small").eval()(torch.randn(2, 3, *size))
    assert y_enc.shape == (2, 128, *expected[-1]) and y_dec.shape == (2, 64, *size)


def batch(seed: int, count: int = 4):
    """Grey scenes, each with a coloured square that moves against its ground."""
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(rng.normal(0, 0.2, (count, 3, 48, 48))).float()
    flow = torch.zeros(count, 2, 48, 48)
    for i in range(count):
        y, x = rng.integers(8, 24, 2)
        image[i, :, y : y + 16, x : x + 16] += torch.tensor([1.5, -1.0, -1.0])[:, None, None]
        flow[i, :, y : y + 16, x : x + 16] = torch.from_numpy(rng.normal(0, 3, 2)).float()[:, None, None]
    crops = [torch.stack([random_crop_matrix((48, 48), rng, (0.8, 1.0)) for _ in range(count)]) for _ in range(2)]
    return image, flow, *crops


def test_the_gradient_reaches_the_encoder_through_both_crops():
    torch.manual_seed(0)
    module = FlowFeatTraining("conv_small", FlowFeatLossConfig(fit_with="trained"), (32, 32)).train()
    image, flow, crop1, crop2 = batch(0, 2)
    module.training_losses(image, flow, crop1, crop2).total.backward()
    first = module.encoder.stem[0].weight
    assert first.requires_grad and float(first.grad.abs().sum()) > 0
    maps1, maps2 = module.encode(module.sample_crops(image, crop1, crop2))
    flow1, _, _ = module.sample_flow(flow, crop1, crop2)
    assert module.fit(maps1, flow1).requires_grad
    frozen = FlowFeatTraining("conv_small", FlowFeatLossConfig(), (32, 32)).train()
    assert not frozen.fit(frozen.encode(frozen.sample_crops(image, crop1, crop2))[0], flow1).requires_grad


def test_forty_steps_teach_which_pixels_move_together():
    torch.manual_seed(0)
    loss = FlowFeatLossConfig(fit_with="trained", flow_weight=1.0, edge_weight=0.1)
    module = FlowFeatTraining("conv_small", loss, (32, 32), ema_beta=0.5, ema_every=1).train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        found = module.training_losses(*batch(step))
        found.total.backward()
        optimizer.step()
        module.update_ema()
        losses.append(float(found.flow))
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3]), losses
    y_enc, y_dec = module.student()(torch.randn(1, 3, 48, 48))
    assert y_dec.shape == (1, 64, 48, 48)


def test_tokens_of_cells_behind_their_mean():
    encoder = CellEncoder(CellConfig(width=16))
    first, last = encoder.tokens(torch.randn(2, 3, 24, 32), [0, 3])
    assert first.shape == last.shape == (2, 1 + 6 * 8, 16) and encoder.grid(24, 32) == (6, 8)
    torch.testing.assert_close(last[:, 0], last[:, 1:].mean(dim=1))
    with pytest.raises(ValueError, match="image size 24x30: both sides must be multiples of 4"):
        encoder.tokens(torch.randn(1, 3, 24, 30), [0])


def share_found(backbone: str, shift: int) -> float:
    """Cells whose best correlation, before any training, lies within a patch of where they went."""
    torch.manual_seed(0)
    model = FlowModel(FlowModelConfig(backbone, width=32)).eval()
    noise = F.interpolate(torch.rand(2, 3, 12, 18), size=(72, 108), mode="bicubic").clamp(0, 1)
    images = [noise[..., 4 : 4 + 64, shift : shift + 96], noise[..., 4 : 4 + 64, :96]]  # all moves to the right
    with torch.no_grad():
        best = local_correlation(*(model.encode(image).fused for image in images), 4).argmax(dim=1)
    patch = model.encoder.patch_size
    x, y = best % 9 - 4, best // 9 - 4
    near = ((x - shift / patch).abs() < 1) & (y.abs() < 1)
    return near[:, 2:-2, 2:-4].float().mean().item()


def test_untrained_cells_are_found_again_where_patches_are_not():
    assert share_found("nano_conv4", 5) > 0.8 and share_found("nano_vit8", 5) < 0.4
