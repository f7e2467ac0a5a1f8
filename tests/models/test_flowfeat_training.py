"""FlowFeat's training step: published numbers, and what must hold whatever the batch."""

import numpy as np
import pytest
import torch

from kinema.models.ema import EMA
from kinema.models.flowfeat.training import (
    FlowFeatLossConfig,
    FlowFeatTraining,
    NormalEquations,
    crop_matrix,
    edge_loss,
    random_crop_matrix,
    sample_crop,
    standardise_flow,
)

IDENTITY = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])


class EncoderAndDecoder(torch.nn.Module):
    def __init__(self, training: FlowFeatTraining):
        super().__init__()
        self.encoder, self.decoder = training.encoder, training.decoder


@pytest.fixture(scope="module")
def inputs(fill, normalised_image):
    """frame, teacher flow and crop matrices of the golden training step."""

    def matrices(name):
        scale = fill.uniform(0, f"{name}/s", 2, low=0.5, high=0.75)
        tx, ty = (fill.uniform(0, f"{name}/{axis}", 2, low=-1, high=1) * (1 - scale) for axis in ("tx", "ty"))
        zero = torch.zeros(2)
        return torch.stack([torch.stack([scale, zero, tx], 1), torch.stack([zero, scale, ty], 1)], 1)

    offset = fill.uniform(0, "teacher_off", 2, 2, 1, 1, low=-0.05, high=0.05)
    teacher = fill.smooth_flow(0, "teacher", 2, 112, 112, amplitude=0.1) + offset
    return normalised_image(0, "img", 2, 160, 160), teacher, matrices("crop1"), matrices("crop2")


@pytest.fixture(scope="module")
def module(fill, manifest):
    """The training module with the golden's weights; the averaged decoder equals the trained one."""
    module = FlowFeatTraining("dinov2_vits14", input_size=(112, 112)).train()
    fill.fill_(EncoderAndDecoder(module), 0, manifest("flowfeat_dinov2_vits14_yt"))
    module.decoder_ema.ema_model.load_state_dict(module.decoder.state_dict())
    return module


@pytest.fixture(scope="module")
def whole(module, inputs):
    """Losses of the golden step, and the gradient of one weight."""
    module.zero_grad()
    losses = module.training_losses(*inputs)
    losses.total.backward()
    return losses, module.decoder.scratch.output_conv1[2].weight.grad.clone()


@pytest.fixture(scope="module")
def alone(module, inputs):
    """Losses of its first sample."""
    with torch.no_grad():
        return module.training_losses(*(value[:1] for value in inputs))


def test_checkpoint_keys_equal_published_training_runs(module, manifest, assert_state_matches):
    assert_state_matches(module, manifest("flowfeat_train_dinov2_vits14"))


def test_step_equals_the_published_one(module, inputs, golden):
    reference = golden("flowfeat_train__s0_112")
    frame, teacher, params1, params2 = inputs
    module.zero_grad()
    losses = module.training_losses(*inputs)
    losses.total.backward()

    assert losses.num_skipped == 0
    for key, value in {"flowres": losses.flow, "flowbdr": losses.edge, "total": losses.total}.items():
        reference.check(key, value, atol=0.0, rtol=1e-5)
    reference.check("student_flow", losses.student_flow.permute(0, 2, 3, 1), atol=0.0, rtol=1e-4)
    reference.check("teacher_flow_crop2", losses.teacher_flow.permute(0, 2, 3, 1), atol=0.0, rtol=1e-5)

    crops = module.sample_crops(frame, params1, params2)
    reference.check("params1", params1, atol=0.0, rtol=1e-6)
    reference.check("params2", params2, atol=0.0, rtol=1e-6)
    reference.check("crop1", crops[:2], atol=0.0, rtol=1e-5)
    reference.check("crop2", crops[2:], atol=0.0, rtol=1e-5)
    flow1, _, _ = module.sample_flow(teacher, params1, params2)
    reference.check("teacher_flow_crop1", flow1, atol=0.0, rtol=1e-5)
    maps1, maps2 = module.encode(crops)
    with torch.no_grad():
        reference.check("features_ema", module.decoder_ema(maps1, (112, 112)), atol=0.0, rtol=2e-5)
        reference.check("features", module.decoder(maps2, (112, 112)), atol=0.0, rtol=2e-5)
    reference.check("A", module.fit(maps1, flow1), atol=0.0, rtol=5e-4)

    decoder = module.decoder
    gradients = {
        "grad_output_conv1_2_weight": decoder.scratch.output_conv1[2].weight,
        "grad_act_postprocess4_post_0_weight": decoder.act_postprocess4.post[0].weight,
        "grad_refinenet3_resConfUnit1_conv1_weight": decoder.scratch.refinenet3.resConfUnit1.conv1.weight,
    }
    for key, parameter in gradients.items():
        reference.check(key, parameter.grad, atol=0.0, rtol=1e-2)


def test_gradient_reaches_the_trained_decoder_only(module, inputs):
    module.zero_grad()
    module.training_losses(*inputs).total.backward()
    assert all(p.grad is None for p in module.encoder.parameters())
    assert all(p.grad is None for p in module.decoder_ema.ema_model.parameters())
    for name, parameter in module.decoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("broken", ["constant", "constant_px", "constant_v", "nan", "infinite"])
def test_sample_without_a_defined_loss_is_left_out(module, inputs, alone, broken):
    frame, teacher, params1, params2 = inputs
    teacher = teacher.clone()
    if broken == "constant":
        teacher[1] = 0.25
    elif broken == "constant_px":  # standardising and sampling leave rounding, not exact zeros
        teacher[1] = torch.tensor([37.3, -8.1]).view(2, 1, 1)
    elif broken == "constant_v":
        teacher[1, 1] = 0.0
    else:
        teacher[1, 0, 5, 5] = float(broken.replace("infinite", "inf"))
    module.zero_grad()
    both = module.training_losses(frame, teacher, params1, params2)
    both.total.backward()
    assert both.valid.tolist() == [True, False] and both.num_skipped == 1
    torch.testing.assert_close(both.total, alone.total, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.decoder.parameters())


def test_batch_of_nothing_but_constant_flow_gives_zero_loss_and_gradient(module, inputs):
    frame, teacher, params1, params2 = inputs
    module.zero_grad()
    losses = module.training_losses(frame, torch.zeros_like(teacher), params1, params2)
    losses.total.backward()
    assert losses.num_skipped == 2
    assert losses.total.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in module.decoder.parameters())


def test_steps_lower_the_loss_and_the_average_follows(inputs):
    torch.manual_seed(0)
    frame, teacher, params1, params2 = (t[:1] for t in inputs)
    module = FlowFeatTraining("dinov2_vits14", input_size=(56, 56)).train()
    optimiser = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    start = [p.clone() for p in module.decoder_ema.ema_model.parameters()]
    totals = []
    for _ in range(25):
        losses = module(frame, teacher, params1, params2)
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
        module.update_ema()
        totals.append(losses.total.item())
    assert totals[-1] < 0.8 * totals[0]
    assert int(module.decoder_ema.step) == 25
    moved = zip(start, module.decoder_ema.ema_model.parameters(), strict=True)
    assert any(not torch.equal(old, new) for old, new in moved)


def test_student_is_the_averaged_model_and_loads_strictly(module, normalised_image):
    from kinema.models.flowfeat.model import FlowFeat

    student = module.student(ema=True)
    assert not any(p.is_meta for p in student.parameters())
    fresh = FlowFeat("dinov2_vits14")
    fresh.load_state_dict(student.state_dict(), strict=True)
    x = normalised_image(1, "img", 1, 56, 70)
    with torch.no_grad():
        for ours, theirs in zip(student(x), fresh.eval()(x), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_ema_schedule_equals_the_published_one(golden):
    reference = golden("flowfeat_ema_schedule")
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = EMA(model, beta=0.999, update_every=5)
    values, decays = [], []
    for _ in range(60):
        with torch.no_grad():
            model.weight += 1
        ema.update()
        values.append(ema.ema_model.weight.item())
        decays.append(ema.decay())
    reference.check("ema_value_after_update_i", np.array(values), atol=0.0, rtol=1e-6)
    reference.check("decay_after_update_i", np.array(decays), atol=0.0, rtol=1e-6)


def test_ema_resumes_where_it_stopped():
    def run(ema, calls):
        for _ in range(calls):
            with torch.no_grad():
                ema.online_model.weight += 1
            ema.update()
        return ema

    torch.manual_seed(0)
    straight = EMA(torch.nn.Linear(2, 2))
    stopped = EMA(torch.nn.Linear(2, 2))
    stopped.load_state_dict(straight.state_dict())
    run(straight, 23)
    run(stopped, 8)
    resumed = EMA(torch.nn.Linear(2, 2))
    resumed.load_state_dict(stopped.state_dict())
    run(resumed, 15)
    for key, value in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=0, atol=0)


def test_crop_matrices_equal_the_published_ones(golden):
    reference = golden("flowfeat_crop_params")
    matrices = [
        crop_matrix(tuple(i["size_hw"]), i["dy"], i["dx"], i["scale"], i["alpha_deg"], i["flip"])
        for i in reference.meta["inputs"]
    ]
    reference.check("affine_fixed", torch.stack(matrices), atol=0.0, rtol=1e-6)


def test_random_crops_follow_the_published_rule_and_stay_inside(golden):
    """Side in the range, offsets on the half-pixel lattice that whole windows allow."""
    published = torch.from_numpy(golden("flowfeat_crop_params").data["affine_random"])
    rng = np.random.default_rng(0)
    drawn = torch.stack([random_crop_matrix((448, 448), rng) for _ in range(300)])
    for matrices, half in ((published[:6], 224), (drawn, 224)):
        scale, offset = matrices[:, 0, 0], matrices[:, :, 2]
        assert ((scale >= 0.5) & (scale <= 0.75)).all()
        torch.testing.assert_close(scale, matrices[:, 1, 1])
        steps = offset * half * 2
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
        assert (offset.abs() + scale[:, None] <= 1 + 1 / half).all()
    assert drawn[:, 0, 0].min() < 0.51 and drawn[:, 0, 0].max() > 0.74
    assert drawn[:, :, 2].min() < -0.3 and drawn[:, :, 2].max() > 0.3


def test_crop_cuts_the_window_it_names():
    """A ramp of x and y sampled by a crop shows which pixels were read."""
    rows, cols = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
    ramp = torch.stack([cols, rows])[None]
    # A window of 20 x 30 pixels whose corner is at row 4, column 10.
    matrix = crop_matrix((40, 60), dy=4 + 10 - 20, dx=10 + 15 - 30, scale=2.0)[None]
    crop = sample_crop(ramp, matrix, (20, 30))
    torch.testing.assert_close(crop[0, 0, 0], torch.arange(10.0, 40.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(crop[0, 1, :, 0], torch.arange(4.0, 24.0), rtol=0, atol=1e-4)


def test_normal_equations_recover_a_linear_map():
    torch.manual_seed(0)
    features = torch.randn(5000, 8)
    truth = torch.randn(9, 2)
    flow = features @ truth[:-1] + truth[-1]
    equations = NormalEquations()
    for part in (slice(0, 1234), slice(1234, 5000)):
        equations.add(features[part], flow[part])
    torch.testing.assert_close(equations.solve(1e-6), truth, rtol=1e-3, atol=1e-4)


def test_normal_equations_equal_least_squares():
    torch.manual_seed(1)
    features, flow = torch.randn(3000, 16) + 0.5, torch.randn(3000, 2)
    equations = NormalEquations()
    equations.add(features, flow)
    x = torch.cat([features, torch.ones(3000, 1)], dim=1).double()
    lhs = x.T @ x / 3000 + 0.1 * torch.eye(17, dtype=torch.float64)
    expected = torch.linalg.lstsq(lhs, x.T @ flow.double() / 3000).solution
    torch.testing.assert_close(equations.solve(0.1), expected.float(), rtol=1e-4, atol=1e-6)


def test_standardised_flow_has_unit_statistics():
    torch.manual_seed(0)
    flow = standardise_flow(torch.randn(2, 2, 30, 40) * torch.tensor([3.0, 40.0]).view(1, 2, 1, 1) + 7)
    torch.testing.assert_close(flow.mean(dim=(2, 3)), torch.zeros(2, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(flow.std(dim=(2, 3)), torch.ones(2, 2), rtol=1e-4, atol=0)


def test_edge_loss_by_hand():
    """One teacher step of height 1 along x: all weight on that column, where the student has 0.25."""
    teacher, student = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    teacher[..., 2:] = 1.0
    student[..., 2:] = 0.25
    teacher[:, :, 2:] += 2.0  # along y: a step of 2, of which the student knows nothing
    loss, defined = edge_loss(student, teacher, sigma=0.1)
    assert defined.tolist() == [True]
    torch.testing.assert_close(loss, torch.tensor([0.75 + 2.0]))


def test_equal_confidence_changes_nothing_and_pixels_without_any_do_not_count(module, inputs):
    frame, teacher, params1, params2 = inputs
    with torch.no_grad():
        plain = module.training_losses(*inputs)
        even = module.training_losses(*inputs, torch.full((2, 1, 112, 112), 0.3))
        known = torch.zeros(2, 1, 112, 112)
        known[..., :56] = 1
        half = module.training_losses(frame, teacher, IDENTITY.expand(2, -1, -1), IDENTITY.expand(2, -1, -1), known)
    assert even.total.item() == pytest.approx(plain.total.item(), rel=1e-4)
    difference = (half.student_flow - half.teacher_flow).abs().sum(1)
    assert half.flow.item() == pytest.approx(difference[..., :55].mean().item(), rel=0.03)
    student, truth = torch.rand(1, 2, 4, 4, requires_grad=True), torch.rand(1, 2, 4, 4)
    sure = torch.ones(1, 1, 4, 4)
    sure[..., 3] = 0
    edge_loss(student, truth, 0.1, sure)[0].sum().backward()
    assert not student.grad[..., 3].any() and student.grad[..., :3].any()


@pytest.mark.parametrize("pixels", [1000, 112 * 112, 3 * 112 * 112], ids=["part", "sample", "batch"])
def test_step_does_not_depend_on_the_pieces(module, inputs, whole, monkeypatch, pixels):
    """Pieces smaller than a sample, of a sample, and of several samples."""
    losses, gradient = whole
    weight = module.decoder.scratch.output_conv1[2].weight
    monkeypatch.setattr("kinema.models.flowfeat.training.PIXELS_PER_PIECE", {"cpu": pixels})
    module.zero_grad()
    pieces = module.training_losses(*inputs)
    pieces.total.backward()
    torch.testing.assert_close(pieces.student_flow, losses.student_flow, rtol=0, atol=1e-4)
    torch.testing.assert_close(weight.grad, gradient, rtol=0, atol=1e-2 * gradient.abs().max().item())


def test_ridge_comes_from_the_config(inputs):
    torch.manual_seed(0)
    frame, teacher, params1, params2 = (t[:1] for t in inputs)
    strong = FlowFeatLossConfig(ridge_alpha=1e6)
    module = FlowFeatTraining("dinov2_vits14", strong, input_size=(28, 28))
    losses = module.training_losses(frame, teacher, params1, params2)
    assert losses.student_flow.abs().max() < 1e-2  # so strong a ridge leaves no map at all


@pytest.mark.parametrize("name", ["ridge_alpha", "edge_sigma"])
def test_constants_that_divide_by_zero_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0.0 must be positive; use 0.1"):
        FlowFeatLossConfig(**{name: 0.0})


def test_autocast_keeps_the_solve_in_float32(module, inputs):
    frame, teacher, params1, params2 = (t[:1] for t in inputs)
    full = module.training_losses(frame, teacher, params1, params2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module.training_losses(frame, teacher, params1, params2)
    assert low.total.dtype == torch.float32 and low.student_flow.dtype == torch.float32
    torch.testing.assert_close(low.total, full.total, rtol=0.1, atol=0.0)
