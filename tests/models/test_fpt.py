"""Flow Poke Transformer: the published network's numbers, and what its users rely on."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kinema.kernels import recompute
from kinema.models.backbones.inference_linear import can_keep_fp16
from kinema.models.fpt import model as module
from kinema.models.fpt.mixture import GaussianMixture
from kinema.models.fpt.model import _PROJECTED, PRESETS, FlowPokeTransformer, flow_poke_transformer
from kinema.models.weights import NonCommercialWeightsWarning, load_weights

TOLERANCE = 2e-5
FEEDBACK_TOLERANCE = 3e-4
GRADIENT_TOLERANCE = 1e-4
# Small enough to be called dozens of times: 2 layers of 2 heads, 6 x 6 cells.
MINIATURE = {"width": 64, "depth": 2, "head_dim": 32, "image_encoder": "tiny_vit8", "image_size": 48}


@pytest.fixture(scope="module")
def small(fill, manifest):
    contract = manifest("fpt_small")
    return fill.fill_(FlowPokeTransformer(**contract["constructor"]).eval(), 0, contract)


@pytest.fixture(scope="module")
def miniature(fill):
    """A network with random weights everywhere, also where the initial ones are zero."""
    model = FlowPokeTransformer(**MINIATURE).eval()
    return fill.fill_(model, 0, skip=("input_mlp.coeffs", "transformer.pos_emb.freqs"))


@pytest.fixture
def scene(fill):
    """`scene(batch, pokes, queries)` -> the arguments of a prediction, before the image."""

    def draw(batch, num_pokes, num_queries, seed=0):
        return {
            "poke_pos": fill.uniform(seed, "poke_pos", batch, num_pokes, 2),
            "poke_flow": fill.normal(seed, "poke_flow", batch, num_pokes, 2, std=0.15),
            "query_pos": fill.uniform(seed, "query_pos", batch, num_queries, 2),
            "camera_static": torch.tensor([(i + seed) % 2 == 0 for i in range(batch)]),
        }

    return draw


def embed(model, fill, batch, height=48, width=48):
    with torch.no_grad():
        return model.embed_image(2 * fill.image(0, "img", batch, height, width) - 1)


def assert_same(found: GaussianMixture, expected: GaussianMixture, atol: float = 1e-5) -> None:
    for name in ("logits", "loc", "scale_tril"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=atol, rtol=0)


def check_parallel(model, fill, expected, size, num_queries):
    value = fill.normal(0, "value", 1, num_queries, 2, std=0.5).double()
    poke_pos = fill.uniform(0, "poke_pos", 1, 5, 2)
    poke_flow = fill.normal(0, "poke_flow", 1, 5, 2, std=0.15)
    query_pos = fill.uniform(0, "query_pos", 1, num_queries, 2)
    static = torch.tensor([True])
    tokens = []
    hook = model.input_mlp.register_forward_hook(lambda *call: tokens.append(call[-1]))
    with torch.no_grad():
        d_img = model.embed_image(2 * fill.image(0, "img", 1, size, size) - 1)
        mixture = model.predict_parallel(poke_pos, poke_flow, query_pos, static, d_img)
        single = model.predict_parallel(poke_pos, poke_flow, query_pos[:, :1], static, d_img)
    hook.remove()
    found = {
        "logits": mixture.logits,
        "means": mixture.loc,
        "scale_tril": mixture.scale_tril,
        "feat": d_img["feat"],
        "feat_pos": d_img["pos"],
        "input_tokens": tokens[0],
        "log_prob": mixture.log_prob(value),
        "cdf": mixture.cdf(value)[None],
        "mean": mixture.mean,
        "single_query_means": single.loc,
    }
    for name in expected.data:
        expected.check(name, found[name], atol=0, rtol=TOLERANCE)
    assert mixture.logits.dtype == torch.float64


def test_state_of_the_small_variant(small, manifest, assert_state_matches):
    contract = manifest("fpt_small")
    assert_state_matches(small, contract)
    assert sum(p.numel() for p in small.parameters()) == contract["parameter_count"]
    trainable = sum(p.numel() for p in small.parameters() if p.requires_grad)
    assert trainable == contract["trainable_parameter_count"]
    state = FlowPokeTransformer(**contract["constructor"]).state_dict()
    for name, constant in contract["skipped_values"].items():
        torch.testing.assert_close(state[name].flatten(), torch.tensor(constant["values"]), atol=0, rtol=1e-6)


def test_small_parallel(small, golden, fill):
    check_parallel(small, fill, golden("fpt_small__s0_parallel"), 112, 6)


def test_state_of_the_base_variant(manifest, assert_state_matches):
    """The released architecture: keys, shapes, parameter count."""
    with torch.device("meta"):
        model = flow_poke_transformer()
    assert not model.training
    assert_state_matches(model, manifest("fpt_base"))
    assert sum(p.numel() for p in model.parameters()) == 233_475_768


@pytest.mark.slow
def test_base_parallel(golden, fill, manifest):
    contract, model = manifest("fpt_base"), flow_poke_transformer()
    check_parallel(fill.fill_(model, 0, contract), fill, golden("fpt_base__s0_parallel"), 224, 7)


@pytest.mark.parametrize(("name", "num_queries"), [("autoregressive", 6), ("autoregressive_forced", 8)])
def test_small_autoregressive(name, num_queries, small, golden, fill, monkeypatch):
    """Samples are replaced by means, or by fixed values, as in the recorded runs."""
    forced = fill.normal(0, "forced", 1, 8, 2, std=0.15)
    steps = []

    def sample(mixture, *_, **__):
        steps.append(mixture.loc)
        return mixture.mean if name == "autoregressive" else forced[:, len(steps) - 1 : len(steps)]

    monkeypatch.setattr(GaussianMixture, "sample", sample)
    found = small.predict_autoregressive(
        fill.uniform(0, "poke_pos", 1, 4, 2),
        fill.normal(0, "poke_flow", 1, 4, 2, std=0.15),
        fill.uniform(0, "query_pos", 1, num_queries, 2),
        True,
        embed(small, fill, 1, 112, 112),
    )
    expected = golden(f"fpt_small__s0_{name}")
    tolerance = FEEDBACK_TOLERANCE if name == "autoregressive" else TOLERANCE
    expected.check("component_means_per_step", torch.cat(steps, dim=1), atol=0, rtol=tolerance)
    flow = "flow_sequence" if name == "autoregressive" else "flow_sequence_forced"
    expected.check(flow, found, atol=0, rtol=tolerance)


@pytest.fixture(scope="module")
def training_batch(fill):
    return {
        "poke_pos": fill.uniform(0, "pos_poke", 2, 6, 2),
        "poke_flow": fill.normal(0, "flow_poke", 2, 6, 2, std=0.15),
        "query_pos": fill.uniform(0, "pos_query", 2, 6, 3, 2),
        "query_flow": fill.normal(0, "flow_query", 2, 6, 3, 2, std=0.3),
        "camera_static": torch.tensor([True, False]),
        "image": 2 * fill.image(0, "img", 2, 112, 112) - 1,
    }


def test_small_training(small, golden, training_batch):
    nll = small.negative_log_likelihood(**training_batch)
    assert nll.dtype == torch.float64
    nll.mean().backward()
    first = small.transformer.layers[0]
    gradients = {
        "grad_out_mlp_last_weight": small.out_mlp[5].weight.grad,
        "grad_cond_emb_weight": small.cond_emb.weight.grad,
        "grad_query_token": small.input_mlp.query_token.grad,
        "grad_layer0_self_scale": first.self_scale.grad,
        "grad_layer0_cross_kv_weight": first.cross_kv.weight.grad,
        "grad_encoder_cls_token": small.image_embedder.model.cls_token.grad,
    }
    expected = golden("fpt_small__s0_train")
    expected.check("loss", nll.mean(), atol=0, rtol=TOLERANCE)
    expected.check("log_prob", -nll.flatten(1), atol=0, rtol=TOLERANCE)
    for name, gradient in gradients.items():
        expected.check(name, gradient, atol=0, rtol=GRADIENT_TOLERANCE)
    without = {id(p) for p in small.parameters() if p.requires_grad and p.grad is None}
    assert without == {id(p) for p in small.unused_parameters()}
    small.zero_grad()


def forward_arguments(batch):
    """Positions, flow and is_query of the training sequence, as `forward` takes them."""
    pos = torch.cat([batch["poke_pos"], batch["query_pos"].flatten(1, 2)], dim=1)
    flow = torch.cat([batch["poke_flow"], torch.zeros(2, 18, 2)], dim=1)
    return pos, flow, (torch.arange(24) >= 6).expand(2, -1), batch["camera_static"]


@torch.no_grad()
def test_forward_takes_patterns_and_dense_masks_that_are_patterns(miniature, fill, golden, training_batch):
    pos, flow, is_query, static = forward_arguments(training_batch)
    d_img = embed(miniature, fill, 2)
    dense = torch.from_numpy(golden("fpt_small__s0_train").data["mask_dense"]).bool()
    rows, columns = torch.arange(24)[:, None], torch.arange(24)
    masks = {
        ("query-causal", 6): dense,
        ("query-inference", 6): (columns <= rows) & (columns < 6) | (columns == rows),
        "causal": columns <= rows,
        "full": torch.ones(24, 24, dtype=torch.bool),
    }
    found = {}
    for pattern, mask in masks.items():
        found[pattern] = miniature(pos, flow, is_query, static, pattern, d_img)
        for shape in ((24, 24), (1, 1, 24, 24), (2, 1, 24, 24)):
            assert_same(miniature(pos, flow, is_query, static, mask.expand(shape), d_img), found[pattern], atol=0)
    assert_same(miniature(pos, flow, is_query, static, None, d_img), found["full"], atol=0)
    for one, other in itertools.combinations(found.values(), 2):
        assert (one.loc - other.loc).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("flip", [(3, 5), (20, 0), (20, 23), (9, 9), (23, 5)])
def test_other_dense_masks_are_refused(flip, miniature, fill, golden, training_batch):
    mask = torch.from_numpy(golden("fpt_small__s0_train").data["mask_dense"]).bool().clone()
    mask[flip] = ~mask[flip]
    with pytest.raises(ValueError, match="6 pokes and 18 queries is none of the patterns.*query-causal"):
        miniature(*forward_arguments(training_batch), mask, embed(miniature, fill, 2))


@pytest.mark.parametrize("mask", [torch.ones(24, 24), torch.ones(24, 23, dtype=torch.bool), torch.ones(24).bool()])
def test_masks_of_another_kind_are_refused(mask, miniature, fill, training_batch):
    with pytest.raises(ValueError, match=r"must be bool \[\.\.\., 24, 24\]"):
        miniature(*forward_arguments(training_batch), mask, embed(miniature, fill, 2))


@torch.no_grad()
def test_prefixes_see_the_pokes_before_theirs(miniature, fill, training_batch):
    d_img = embed(miniature, fill, 2)
    poke_pos, poke_flow, query_pos = (training_batch[k] for k in ("poke_pos", "poke_flow", "query_pos"))
    prefixes = miniature.predict_prefixes(poke_pos, poke_flow, query_pos, training_batch["camera_static"], d_img)
    assert prefixes.batch_shape == (2, 6, 3)
    for known in range(6):
        parallel = miniature.predict_parallel(
            poke_pos[:, :known], poke_flow[:, :known], query_pos[:, known], training_batch["camera_static"], d_img
        )
        assert_same(prefixes[:, known], parallel)


@torch.no_grad()
def test_queries_do_not_see_one_another(miniature, fill, scene):
    arguments, d_img = scene(2, 4, 9), embed(miniature, fill, 2)
    together = miniature.predict_parallel(**arguments, d_img=d_img)
    alone = miniature.predict_parallel(**arguments | {"query_pos": arguments["query_pos"][:, 5:6]}, d_img=d_img)
    assert_same(alone, together[:, 5:6])


@torch.no_grad()
def test_flow_and_camera_matter_and_without_pokes_it_predicts_too(miniature, fill, scene):
    arguments, d_img = scene(2, 4, 9), embed(miniature, fill, 2)
    mean = miniature.predict_parallel(**arguments, d_img=d_img).mean
    for changed in (
        {"poke_flow": -arguments["poke_flow"]},
        {"camera_static": ~arguments["camera_static"]},
        scene(2, 0, 9) | {"query_pos": arguments["query_pos"]},
    ):
        other = miniature.predict_parallel(**arguments | changed, d_img=d_img).mean
        assert other.shape == mean.shape and (other - mean).abs().max() > 1e-3


@torch.no_grad()
def test_one_image_serves_a_batch_and_may_be_projected_once(miniature, fill, scene):
    arguments, d_img = scene(3, 4, 5), embed(miniature, fill, 1)
    repeated = {k: v.expand(3, -1, -1, -1) for k, v in d_img.items()}
    expected = miniature.predict_parallel(**arguments, d_img=repeated)
    assert_same(miniature.predict_parallel(**arguments, d_img=d_img), expected)
    assert_same(miniature.predict_parallel(**arguments, d_img=miniature.project_image(d_img)), expected)
    assert_same(miniature.predict_parallel(**arguments, d_img=miniature.project_image(repeated)), expected)
    samples = [
        miniature.predict_autoregressive(**arguments, d_img=d, generator=torch.Generator().manual_seed(0))
        for d in (d_img, repeated, miniature.project_image(d_img))
    ]
    torch.testing.assert_close(samples[0], samples[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(samples[0], samples[2], atol=1e-4, rtol=0)


@torch.no_grad()
def test_an_image_is_projected_once_until_something_changes(miniature, fill, scene, monkeypatch):
    model = FlowPokeTransformer(**MINIATURE).eval()
    model.load_state_dict(miniature.state_dict())
    arguments, d_img = scene(2, 4, 5), embed(model, fill, 1)
    projections = []
    project = type(model.transformer).image_keys_values
    monkeypatch.setattr(
        type(model.transformer), "image_keys_values", lambda *args: projections.append(1) or project(*args)
    )
    first = model.predict_parallel(**arguments, d_img=d_img)
    assert torch.equal(model.predict_parallel(**arguments, d_img=d_img).mean, first.mean)
    model.predict_autoregressive(**arguments, d_img=d_img)
    assert len(projections) == 1
    assert_same(miniature.predict_parallel(**arguments, d_img=d_img), first)  # another model
    assert len(projections) == 2

    model.transformer.layers[0].cross_kv.weight.mul_(1.5)
    stale = model.predict_parallel(**arguments, d_img=d_img)
    assert len(projections) == 3
    fresh = {name: value.clone() for name, value in d_img.items()}
    assert torch.equal(model.predict_parallel(**arguments, d_img=fresh).mean, stale.mean)
    assert (stale.mean - first.mean).abs().max() > 1e-4
    d_img["feat"].mul_(1.5)
    assert (model.predict_parallel(**arguments, d_img=d_img).mean - stale.mean).abs().max() > 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        model.predict_parallel(**arguments, d_img=d_img)
    assert len(projections) == 6
    with torch.enable_grad():
        model.predict_parallel(**arguments, d_img=d_img)
    assert len(projections) == 6, "gradients must reach the projection"


@torch.no_grad()
def test_few_images_are_remembered_and_no_sample_asks_for_nothing(miniature, fill, scene):
    arguments = scene(1, 4, 5)
    images = [embed(miniature, fill, 1) for _ in range(4)]
    for d_img in images:
        miniature.predict_parallel(**arguments, d_img=d_img)
    assert [d_img["feat"] in _PROJECTED for d_img in images] == [False, False, True, True]
    nobody = {name: value[:0] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    assert miniature.predict_parallel(**nobody, d_img=images[0]).mean.shape == (0, 5, 2)
    assert miniature.predict_autoregressive(**nobody, d_img=images[0]).shape == (0, 5, 2)


def test_what_the_backward_pass_makes_again_changes_no_number(miniature, scene, fill, monkeypatch):
    model = FlowPokeTransformer(**MINIATURE).train()
    model.load_state_dict(miniature.state_dict())
    d_img = {name: value.detach() for name, value in embed(model, fill, 2).items()}
    arguments = scene(2, 4, 8)
    grouped = {**arguments, "query_pos": arguments["query_pos"].unflatten(1, (4, 2))}

    storages = []

    def note(tensor):
        storages.append(tensor.untyped_storage())
        return tensor

    def noted_checkpoint(work, *inputs, **options):
        for tensor in inputs:
            note(tensor)  # what a checkpoint holds is no saved tensor
        return checkpoint(work, *inputs, **options)

    monkeypatch.setattr(recompute, "checkpoint", noted_checkpoint)

    def gradients():
        model.zero_grad()
        storages.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model.predict_prefixes(**grouped, d_img=d_img).mean.square().sum()
        kept = {storage.data_ptr(): storage.nbytes() for storage in storages}
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, sum(kept.values())

    weights = sum(parameter.nbytes for parameter in model.transformer.parameters())
    found, kept = gradients()
    monkeypatch.setattr(recompute, "checkpoint", lambda work, *args, **_: work(*args))
    expected, all_kept = gradients()
    assert found.keys() == expected.keys() and len(found) > 20
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert kept - weights < 0.8 * (all_kept - weights)


@pytest.mark.parametrize(
    ("narrow", "allowed"),
    [(FlowPokeTransformer.in_bf16, 0.05), (FlowPokeTransformer.with_fp16_weights, 0.003)],
)
@torch.no_grad()
def test_a_narrow_copy_predicts_alike(narrow, allowed, miniature, fill, scene):
    if narrow is FlowPokeTransformer.with_fp16_weights and not can_keep_fp16():
        pytest.skip("this build of PyTorch has no FBGEMM")
    arguments = scene(2, 4, 6)
    model = narrow(miniature)
    expected = miniature.predict_parallel(**arguments, d_img=embed(miniature, fill, 1))
    d_img = embed(model, fill, 1)
    found = model.predict_parallel(**arguments, d_img=d_img)
    assert found.loc.dtype == torch.float64
    assert 0 < (found.mean - expected.mean).abs().max() < allowed
    draws = [
        network.predict_autoregressive(
            **arguments, d_img=embed(network, fill, 1), generator=torch.Generator().manual_seed(0)
        )
        for network in (miniature, model)
    ]
    assert draws[1].dtype == torch.float32 and draws[1].isfinite().all()
    assert 0 < (draws[0][:, 0] - draws[1][:, 0]).abs().max() < allowed  # the first draw; later ones follow earlier ones


@torch.no_grad()
@pytest.mark.parametrize("num_pokes", [0, 1, 4])
def test_cached_steps_equal_predictions_from_all_that_is_known(num_pokes, miniature, fill, scene, monkeypatch):
    """Every step's mixture, for a batch, is that of a parallel prediction given pokes and earlier samples."""
    arguments, d_img = scene(3, num_pokes, 5), embed(miniature, fill, 3)
    steps = []
    draw = GaussianMixture.sample

    def record(mixture, *args, **options):
        steps.append(mixture)
        return draw(mixture, *args, **options)

    monkeypatch.setattr(GaussianMixture, "sample", record)
    flow = miniature.predict_autoregressive(**arguments, d_img=d_img, generator=torch.Generator().manual_seed(0))
    assert flow.shape == (3, 5, 2) and len(steps) == 5
    for step, mixture in enumerate(steps):
        known = {
            "poke_pos": torch.cat([arguments["poke_pos"], arguments["query_pos"][:, :step]], dim=1),
            "poke_flow": torch.cat([arguments["poke_flow"], flow[:, :step]], dim=1),
            "query_pos": arguments["query_pos"][:, step : step + 1],
        }
        assert_same(mixture, miniature.predict_parallel(**arguments | known, d_img=d_img))


@torch.no_grad()
def test_samples_in_random_order_come_back_in_the_callers_order(miniature, fill, scene, monkeypatch):
    """A "sample" that is its query's position shows which query it belongs to."""
    arguments, d_img = scene(3, 2, 7), embed(miniature, fill, 3)
    visited = []
    tokens = miniature.input_mlp.register_forward_hook(lambda _, inputs, __: visited.append(inputs[0][:, -1]))
    monkeypatch.setattr(GaussianMixture, "sample", lambda *_, **__: visited[-1][:, None])
    flow = miniature.predict_autoregressive(
        **arguments, d_img=d_img, randomize_order=True, generator=torch.Generator().manual_seed(0)
    )
    tokens.remove()
    torch.testing.assert_close(flow, arguments["query_pos"], atol=0, rtol=0)
    order = torch.stack(visited, dim=1)
    assert not torch.equal(order, arguments["query_pos"]), "the queries were visited in the given order"
    first = [
        [float(q[0]) for q in batch].index(float(o[0, 0]))
        for batch, o in zip(arguments["query_pos"], order, strict=True)
    ]
    assert len(set(first)) > 1, "every batch element was visited in the same order"


@torch.no_grad()
def test_the_generator_decides_the_samples(miniature, fill, scene):
    arguments, d_img = scene(2, 2, 6), embed(miniature, fill, 2)

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return miniature.predict_autoregressive(**arguments, d_img=d_img, randomize_order=True, generator=generator)

    torch.manual_seed(1)
    first = sample(7)
    torch.manual_seed(2)
    assert torch.equal(first, sample(7))
    assert (first - sample(8)).abs().max() > 1e-3


def test_progress_is_written_on_request_only(miniature, fill, scene, capsys):
    arguments, d_img = scene(1, 2, 3), embed(miniature, fill, 1)
    miniature.predict_autoregressive(**arguments, d_img=d_img)
    assert capsys.readouterr() == ("", "")
    miniature.predict_autoregressive(**arguments, d_img=d_img, verbose=True)
    assert "sampled 3 of 3" in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_bfloat16_stays_close_and_its_cache_is_bfloat16(precision, miniature, fill, scene, monkeypatch):
    arguments = scene(2, 4, 6)
    image = 2 * fill.image(0, "img", 2, 48, 48) - 1
    expected = miniature.predict_parallel(**arguments, d_img=miniature.embed_image(image))
    model = FlowPokeTransformer(**MINIATURE).eval()
    model.load_state_dict(miniature.state_dict())
    if precision == "weights":
        model.to(torch.bfloat16)
    caches = []
    layer = type(model.transformer.layers[0])
    new_cache = layer.new_cache
    monkeypatch.setattr(layer, "new_cache", lambda *args: caches.append(new_cache(*args)) or caches[-1])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        d_img = model.embed_image(image)
        found = model.predict_parallel(**arguments, d_img=d_img)
        flow = model.predict_autoregressive(**arguments, d_img=d_img)
    assert found.loc.dtype == torch.float64
    assert (found.mean - expected.mean).abs().max() < 0.05
    assert (found.mean - expected.mean).abs().max() > 0, "nothing was computed in bfloat16"
    assert {cache.keys.dtype for cache in caches} == {torch.bfloat16}
    assert flow.dtype == torch.float32 and flow.isfinite().all()


def test_casting_the_weights_leaves_the_constants_exact(miniature):
    model = FlowPokeTransformer(**MINIATURE)
    names = ("input_mlp.coeffs", "transformer.pos_emb.freqs")
    exact = {name: model.state_dict()[name].clone() for name in names}
    for cast in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float32):
        model.to(cast)
        for name in names:
            torch.testing.assert_close(model.state_dict()[name].float(), exact[name], atol=0, rtol=0)
    assert {v.dtype for v in model.state_dict().values()} == {torch.float32}


def test_training_under_bfloat16_autocast_has_finite_gradients_close_to_float32(miniature, training_batch):
    gradients = {}
    for enabled in (False, True):
        miniature.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            nll = miniature.negative_log_likelihood(**training_batch)
        assert nll.dtype == torch.float64
        nll.mean().backward()
        gradients[enabled] = torch.cat([p.grad.flatten() for p in miniature.out_mlp.parameters()])
    miniature.zero_grad()
    cosine = torch.nn.functional.cosine_similarity(gradients[False], gradients[True], dim=0)
    assert cosine > 0.99


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(48, 91), (75, 48), (60, 60), (20, 33)])
def test_only_the_central_square_is_seen(height, width, miniature, fill):
    image = 2 * fill.image(0, "img", 1, height, width) - 1
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)
    changed = torch.ones_like(image)
    square = (..., slice(top, top + side), slice(left, left + side))
    changed[square] = image[square]
    found = miniature.embed_image(image)
    assert torch.equal(found["feat"], miniature.embed_image(changed)["feat"])
    assert torch.equal(found["feat"], miniature.embed_image(image[square])["feat"])
    torch.testing.assert_close(found["pos"][0, 0, 0], torch.full((2,), 0.5 / 6))
    assert found["pos"][0, 1, 4].tolist() == pytest.approx([4.5 / 6, 1.5 / 6])


def test_it_learns_that_points_move_together(fill):
    """Every scene moves as a whole, in one of four diagonal directions: one poke tells what all others do."""
    torch.manual_seed(0)
    model = FlowPokeTransformer(**MINIATURE | {"depth": 1})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    d_img = embed(model, fill, 1)
    losses = []
    for _ in range(100):
        flow = 0.2 * torch.randn(16, 1, 2).sign()
        poke_pos, query_pos = torch.rand(16, 4, 2), torch.rand(16, 4, 4, 2)
        mixture = model.predict_prefixes(poke_pos, flow.expand(-1, 4, -1), query_pos, False, d_img)
        nll = -mixture.log_prob(flow[:, :, None].double())
        optimizer.zero_grad()
        nll.mean().backward()
        optimizer.step()
        losses.append(nll.detach().mean((0, 2)))  # by number of known pokes
    known, unknown = losses[-1][1:], losses[-1][0]
    assert (known < losses[0][1:] - 2).all()
    assert (known < unknown - 1).all()


def test_published_weights_load_and_wrong_ones_are_listed(tmp_path, miniature):
    torch.save({"model": miniature.state_dict(), "step": 3}, tmp_path / "good.pt")
    fresh = FlowPokeTransformer(**MINIATURE)
    with pytest.warns(NonCommercialWeightsWarning, match="CC BY-NC 4.0"):
        load_weights(fresh, tmp_path / "good.pt", "fpt_base")
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in miniature.state_dict().items())
    state = miniature.state_dict()
    state["surplus"] = state.pop("cond_emb.weight")
    torch.save({"model": state}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"do not fit fpt_base \(missing: cond_emb.weight; unexpected: surplus\)"):
        load_weights(fresh, tmp_path / "bad.pt", "fpt_base")


def test_presets_build_and_bad_arguments_are_named(miniature, fill, scene):
    assert set(PRESETS) == {"fpt_base", "fpt_tiny", "fpt_nano"}
    for name, limit in {"fpt_tiny": 6e6, "fpt_nano": 2e6}.items():
        assert sum(p.numel() for p in flow_poke_transformer(name).parameters()) < limit
    with pytest.raises(ValueError, match="'fpt_huge' is not known; use one of fpt_base, fpt_tiny"):
        flow_poke_transformer("fpt_huge")
    with pytest.raises(ValueError, match="image_encoder='resnet' is not known"):
        FlowPokeTransformer(**MINIATURE | {"image_encoder": "resnet"})
    with pytest.raises(ValueError, match="image_size=50 is not a multiple of the encoder's patch, 8; use 48"):
        FlowPokeTransformer(**MINIATURE | {"image_size": 50})
    with pytest.raises(ValueError, match="width=60, head_dim=32"):
        FlowPokeTransformer(**MINIATURE | {"width": 60})
    d_img = embed(miniature, fill, 2)
    with pytest.raises(ValueError, match="2 images for a batch of 3"):
        miniature.predict_parallel(**scene(3, 2, 2), d_img=d_img)
    with pytest.raises(ValueError, match="has no query"):
        miniature.predict_parallel(**scene(2, 2, 0), d_img=d_img)
    with pytest.raises(ValueError, match="3 groups and there are 2 pokes"):
        miniature.predict_prefixes(
            torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), torch.zeros(1, 3, 4, 2), True, embed(miniature, fill, 1)
        )


def test_hub_entry(monkeypatch):
    monkeypatch.setattr(module, "flow_poke_transformer", lambda *args, **options: (args, options))
    repo = Path(__file__).resolve().parents[2]
    built = torch.hub.load(str(repo), "fpt_base", source="local", weights="some.pt")
    assert built == (("fpt_base",), {"pretrained": False, "weights": "some.pt"})


COMPILED = """
import torch
from kinema.models.fpt.model import FlowPokeTransformer
torch.manual_seed(0)
model = FlowPokeTransformer(64, 1, 32, "tiny_vit8", 48)
for parameter in model.out_mlp.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
batch = torch.rand(2, 3, 2), torch.rand(2, 3, 2), torch.rand(2, 3, 4, 2), torch.rand(2, 3, 4, 2)
arguments = (*batch, torch.tensor([True, False]), torch.rand(2, 3, 48, 48))
compiled = torch.compile(model.negative_log_likelihood, backend="aot_eager", fullgraph=True)(*arguments)
compiled.mean().backward()
assert model.input_mlp.query_token.grad.abs().max() > 0
torch.testing.assert_close(compiled, model.negative_log_likelihood(*arguments))
"""


@pytest.mark.slow
def test_the_training_step_compiles_as_one_graph():
    """In a process without the shape checks of the tests, which the compiler cannot see through."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
