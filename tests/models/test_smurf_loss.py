"""SMURF's losses: the recorded numbers and gradients, and what they must do on known motion."""

import pytest
import torch

from kinema.models.flow.geometry import warp
from kinema.models.flow.smurf import loss as smurf_loss
from kinema.models.flow.smurf.loss import (
    SmurfLossWeights,
    census_distance,
    census_loss,
    occlusion_mask,
    range_map,
    self_supervision_loss,
    smoothness_loss,
    unsupervised_sequence_loss,
)


def channels_last(maps):
    return maps.permute(0, 2, 3, 1)


@pytest.fixture
def inputs(fill):
    """The recorded images and flows; flow is (row, column) in the record and (x, y) here."""
    forward = fill.smooth_flow(0, "fw", 1, 48, 64, amplitude=2.0)
    backward = -forward + fill.smooth_flow(0, "bw", 1, 48, 64, amplitude=0.6)
    student = [
        flow[:, :, 4:-4, 4:-4] + fill.smooth_flow(0, name, 1, 40, 56, amplitude=1)
        for flow, name in ((forward, "st"), (backward, "sb"))
    ]
    return {
        "image1": fill.image(0, "img", 1, 48, 64),
        "image2": fill.image(0, "img", 1, 48, 64, shift=(2, -1.5), zoom=1.03),
        "forward": forward.flip(1),
        "backward": backward.flip(1),
        "student": [flow.flip(1) for flow in student],
    }


@pytest.fixture
def record(golden):
    return golden("smurf_losses__s0_48x64")


def test_warp_and_range_map(inputs, record):
    warped, inside = warp(inputs["image2"], inputs["forward"], outside="zeros")
    record.check("warped", channels_last(warped), atol=5e-5, rtol=0)
    record.check("valid", inside[..., None].float(), atol=0, rtol=0)
    counts = channels_last(range_map(inputs["backward"]))
    record.check("range_map_backward", counts, atol=5e-5, rtol=0)
    # The record keeps the published polarity: 1 where enough arrows end.
    record.check("occlusion_wang_thresholded", (counts >= 0.75).float(), atol=0, rtol=0)


def test_occlusion(inputs, record):
    wang, brox = (occlusion_mask(inputs["forward"], inputs["backward"], method) for method in ("wang", "brox"))
    inside = warp(inputs["image2"], inputs["forward"])[1][:, None].float()
    record.check("occlusion_wang", channels_last(wang), atol=5e-5, rtol=0)
    record.check("visible_wang", channels_last(1 - wang), atol=5e-5, rtol=0)
    record.check("visible_wang_borders_kept", channels_last(1 - torch.minimum(wang, inside)), atol=5e-5, rtol=0)
    record.check("occlusion_brox", channels_last(brox), atol=0, rtol=0)
    record.check("visible_brox", channels_last(1 - brox), atol=0, rtol=0)
    record.check("visible_brox_borders_kept", channels_last(1 - torch.minimum(brox, inside)), atol=0, rtol=0)
    assert not occlusion_mask(inputs["forward"], inputs["backward"], "none").any()


def test_census_loss_and_its_gradient_through_the_warp(inputs, record):
    flow = inputs["forward"].requires_grad_()
    warped, inside = warp(inputs["image2"], flow, outside="zeros")
    record.check("census_hamming", channels_last(census_distance(inputs["image1"], warped)), atol=2e-3, rtol=0)
    mask = (1 - occlusion_mask(flow, inputs["backward"])) * inside[:, None]
    loss = census_loss(inputs["image1"], warped, mask)
    record.check("census_loss", loss, atol=1e-5, rtol=0)
    loss.backward()
    record.check("tf_grad_census", channels_last(flow.grad.flip(1)), atol=0, rtol=1e-3)


@pytest.mark.parametrize("constant", [4, 150])
@pytest.mark.parametrize("weighting", ["gaussian", "exponential"])
@pytest.mark.parametrize("order", [1, 2])
def test_smoothness_and_its_gradient(order, weighting, constant, inputs, record):
    flow = inputs["forward"].requires_grad_()
    loss = smoothness_loss(inputs["image1"], flow, order, weighting, constant)
    record.check(f"smooth{order}_{weighting}_{constant}", loss, atol=0, rtol=1e-5)
    if (weighting, constant) == ("exponential", 4):
        loss.backward()
        record.check(f"tf_grad_smooth{order}_exponential_4", channels_last(flow.grad.flip(1)), atol=0, rtol=1e-5)


@pytest.mark.parametrize("mask", ["gaussian", "ddflow"])
def test_self_supervision(mask, inputs, record):
    teacher = inputs["forward"], inputs["backward"]
    loss = self_supervision_loss(*teacher, *inputs["student"], crop=4, mask=mask)
    record.check(f"selfsup_{mask}", loss, atol=0, rtol=1e-5)


def test_self_supervision_masks(inputs, record, monkeypatch):
    """The masks as the loss uses them: the student's error is made 1 everywhere, so their product is what is left."""
    monkeypatch.setattr(smurf_loss, "_robust", torch.ones_like)
    loss = self_supervision_loss(inputs["forward"], inputs["backward"], *inputs["student"], crop=4)
    product = record.data["selfsup_student_mask"] * record.data["selfsup_teacher_mask"]
    # `_robust` sees both flow channels, each under the same mask.
    assert loss.item() == pytest.approx(product.mean(), abs=1e-6)


def test_self_supervision_ignores_the_teachers_gradient_and_takes_a_resized_student(inputs):
    teacher = [inputs[name].requires_grad_() for name in ("forward", "backward")]
    student = [torch.zeros(1, 2, 80, 112, requires_grad=True) for _ in range(2)]
    self_supervision_loss(*teacher, *student, crop=4, mask="none").backward()
    assert teacher[0].grad is None and teacher[1].grad is None
    constant = torch.full((1, 2, 48, 64), 0.5)
    loss = self_supervision_loss(constant, -constant, *student, crop=4, mask="none")
    assert loss.item() == pytest.approx(1.0, abs=1e-4)  # half a pixel is one pixel at twice the size


def test_the_sequence_loss_is_the_decayed_mean_of_both_directions(inputs):
    image1, image2 = inputs["image1"], inputs["image2"]
    forward, backward = inputs["forward"], inputs["backward"]
    weights = SmurfLossWeights(smooth1=0.5, edge_constant=4.0)

    def one_direction(image, source, there, back):
        warped, inside = warp(source, there, outside="zeros")
        mask = (1 - occlusion_mask(there, back)) * inside[:, None]
        return torch.stack(
            [
                census_loss(image, warped, mask),
                0.5 * smoothness_loss(image, there, 1, "exponential", 4.0),
                2.0 * smoothness_loss(image, there, 2, "exponential", 4.0),
            ]
        )

    def both(scale):
        there, back = scale * forward, scale * backward
        return (one_direction(image1, image2, there, back) + one_direction(image2, image1, back, there)) / 2

    flows, backs = [0.5 * forward, 0.8 * forward, forward], [0.5 * backward, 0.8 * backward, backward]
    terms = unsupervised_sequence_loss(image1, image2, flows, backs, weights)
    expected = 0.64 * both(0.5) + 0.8 * both(0.8) + both(1.0)
    got = torch.stack([terms[name] for name in ("census", "smooth1", "smooth2")])
    assert torch.allclose(got, expected, rtol=1e-5)
    assert terms["total"].item() == pytest.approx(expected.sum().item(), rel=1e-5)


@pytest.mark.parametrize("occlusion", ["wang", "brox"])
def test_full_images_explain_motion_that_leaves_the_crop(occlusion, fill):
    """A pure shift: with the whole frame the true flow is perfect up to the crop's border, without it is not."""
    full1 = fill.image(3, "img", 1, 64, 80)
    full2 = fill.image(3, "img", 1, 64, 80, shift=(6.0, 0.0))
    crop1, crop2 = (full[..., 8:56, 16:64] for full in (full1, full2))
    flow = torch.zeros(1, 2, 48, 48)
    flow[:, 0] = 6.0
    weights = SmurfLossWeights(smooth2=0.0, occlusion=occlusion)
    whole = unsupervised_sequence_loss(crop1, crop2, [flow], [-flow], weights, (full1, full2), (8, 16))
    cropped = unsupervised_sequence_loss(crop1, crop2, [flow], [-flow], weights)
    perfect = 0.01**0.4
    assert whole["census"].item() == pytest.approx(perfect, rel=0.02)
    assert cropped["census"] > 1.05 * whole["census"]


def test_training_by_the_loss_alone_finds_the_motion(fill):
    """The flow field itself as parameter: only the images say that they moved by (1.5, -1)."""
    image1 = fill.image(1, "img", 1, 40, 48)
    image2 = fill.image(1, "img", 1, 40, 48, shift=(1.5, -1.0))
    motion = torch.tensor([1.5, -1.0])
    forward = torch.zeros(1, 2, 1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([forward], lr=0.1)
    for _ in range(60):
        flow = forward.expand(1, 2, 40, 48)
        loss = unsupervised_sequence_loss(image1, image2, [flow], [-flow], SmurfLossWeights(smooth2=0.0))["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(forward.detach().flatten(), motion, atol=0.1)


def test_wang_marks_what_a_moving_half_covers():
    """The right half of frame 2 comes from 2 px to the left of it: nothing of frame 1 ends at columns 2 to the left."""
    backward = torch.zeros(1, 2, 6, 12)
    backward[:, 0, :, 6:] = 2.0  # in frame 2 the right half came from 2 px further right
    occluded = occlusion_mask(torch.zeros_like(backward), backward, "wang")
    assert occluded[0, 0, 3].tolist() == [0] * 6 + [1, 1] + [0] * 4


def test_unknown_flow_counts_nowhere():
    flow = torch.zeros(1, 2, 4, 4)
    flow[0, 0, 0, 0], flow[0, 1, 1, 1], flow[0, 0, 2, 2] = float("nan"), float("inf"), 1e30
    counts = range_map(flow)[0, 0]
    assert counts.sum().item() == 13
    assert counts[0, 0] == counts[1, 1] == counts[2, 2] == 0


def test_terms_without_weight_are_not_there(inputs):
    flows = [inputs["forward"]], [inputs["backward"]]
    terms = unsupervised_sequence_loss(inputs["image1"], inputs["image2"], *flows, SmurfLossWeights(census=0.0))
    assert set(terms) == {"smooth2", "total"} and terms["total"] == terms["smooth2"] > 0
    none = SmurfLossWeights(census=0.0, smooth2=0.0)
    assert unsupervised_sequence_loss(inputs["image1"], inputs["image2"], *flows, none)["total"].item() == 0


def test_a_mask_without_pixels_gives_no_loss():
    image = torch.rand(1, 3, 20, 20)
    assert census_loss(image, image.flip(2), torch.zeros(1, 1, 20, 20)).item() == 0
    assert census_loss(image[..., :5, :5], image[..., :5, :5], torch.ones(1, 1, 5, 5)).item() == 0


def test_bad_arguments_are_named():
    flow, image = torch.zeros(1, 2, 8, 8), torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="'wang', 'brox', 'none'"):
        occlusion_mask(flow, flow, "forward")
    with pytest.raises(ValueError, match="order=3"):
        smoothness_loss(image, flow, 3)
    with pytest.raises(ValueError, match="sides must be above order=2"):
        smoothness_loss(image[..., :2], flow[..., :2], 2)
    with pytest.raises(ValueError, match="crop=4 leaves nothing"):
        self_supervision_loss(flow, flow, flow, flow, crop=4)
    with pytest.raises(ValueError, match="mask='soft'"):
        self_supervision_loss(flow, flow, flow, flow, crop=1, mask="soft")
    with pytest.raises(ValueError, match="2 forward and 1 backward"):
        unsupervised_sequence_loss(image, image, [flow, flow], [flow])
