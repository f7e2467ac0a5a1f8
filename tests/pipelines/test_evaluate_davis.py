"""DAVIS: measures and statistics against their goldens, official scores, folders, protocols."""

import numpy as np
import pytest
import torch
from PIL import Image

from kinema.pipelines.evaluate.davis import measures
from kinema.pipelines.evaluate.davis.folder import find_sequences, read_labels, write_labels
from kinema.pipelines.evaluate.davis.scores import evaluate_davis, score_results, score_sequence, summarise
from kinema.pipelines.evaluate.probes.fitting import ProbeFit


def _masks(fill, seed, objects, frames, height, width):
    """(annotated, predicted, void) of a golden, by its sidecar's recipe."""

    def picture(k, shift, zoom=1.0):
        return fill.image(seed, f"m{k}", 1, height, width, channels=1, shift=shift, zoom=zoom)[0, 0].numpy() > 0.75

    def exclusive(rows):
        taken, out = np.zeros_like(rows[0]), []
        for row in rows:
            out.append(row & ~taken)
            taken = taken | row
        return np.stack(out)

    annotated = exclusive([np.stack([picture(k, (2 * t, -t)) for t in range(frames)]) for k in range(objects)])
    predicted = exclusive(
        [
            np.stack(
                [
                    picture(k, (2 * t + (0 if t < 2 else 1.5 * (k + 1)), -t + 0.7 * k), 1 + 0.01 * t)
                    for t in range(frames)
                ]
            )
            for k in range(objects)
        ]
    )
    annotated[-1, 1] = predicted[-1, 1] = False
    predicted[-1, 2] = annotated[-1, 3] = False
    void = fill.image(seed, "void", 1, height, width, channels=1)[0, 0].numpy() > 0.8
    return annotated, predicted, np.broadcast_to(void, (frames, height, width))


@pytest.fixture(scope="module", params=[("davis_metrics__s0_60x90", 0, 3, 9), ("davis_metrics__s1_240x427", 1, 2, 12)])
def case(request, fill, golden):
    name, seed, objects, frames = request.param
    height, width = map(int, name.rsplit("_", 1)[1].split("x"))
    masks = _masks(fill, seed, objects, frames, height, width)
    reference = golden(name)
    reference.check("gt_area", masks[0].sum((2, 3)), atol=0, rtol=0)
    reference.check("pred_area", masks[1].sum((2, 3)), atol=0, rtol=0)
    return reference, *masks, fill.image(seed, "spare", 1, height, width, channels=1)[0, 0].numpy() > 0.6


def _both(predicted, annotated, void=None):
    pairs = list(zip(predicted, annotated, strict=True))
    j = np.stack([measures.region_similarity(*pair, void) for pair in pairs])
    return j, np.stack([measures.contour_accuracy(*pair, void) for pair in pairs])


def test_measures_equal_the_official_ones(case):
    reference, annotated, predicted, void, _ = case
    for suffix, hidden in (("", None), ("_void", void)):
        j, f = _both(predicted, annotated, hidden)
        reference.check(f"j{suffix}", j, atol=1e-6, rtol=0)
        reference.check(f"f{suffix}", f, atol=1e-6, rtol=0)
        reference.check(f"j_stats{suffix}", np.array([measures.statistics(row) for row in j]), 1e-6, 0)
        reference.check(f"f_stats{suffix}", np.array([measures.statistics(row) for row in f]), 1e-6, 0)
    reference.check("boundary_gt_object0_frame0", measures.boundary(annotated[0, 0]), atol=0, rtol=0)


def test_a_missing_object_is_an_empty_mask(case):
    reference, annotated, predicted, *_ = case
    predicted = predicted.copy()
    predicted[-1] = False
    j, f = _both(predicted, annotated)
    reference.check("j_missing_object", j, atol=1e-6, rtol=0)
    reference.check("f_missing_object", f, atol=1e-6, rtol=0)


def test_proposals_are_matched_as_officially(case):
    reference, annotated, predicted, void, spare = case
    static = np.broadcast_to(spare, annotated.shape[1:])
    j, f = measures.match_proposals(np.concatenate([predicted[::-1], static[None]]), annotated, void)
    # The official rows follow the proposals, which are the objects in reverse; ours follow the objects.
    reference.check("j_unsupervised_matched", j[::-1], atol=1e-6, rtol=0)
    reference.check("f_unsupervised_matched", f[::-1], atol=1e-6, rtol=0)


def test_summary_equals_the_official_one(case):
    reference, annotated, predicted, *_ = case
    j, f = _both(predicted, annotated)
    pairs = [(measures.statistics(a), measures.statistics(b)) for a, b in zip(j, f, strict=True)]
    scores = summarise({str(k): pair for k, pair in enumerate(pairs)})
    names = ("jf_mean", "j_mean", "j_recall", "j_decay", "f_mean", "f_recall", "f_decay")
    reference.check("global", np.array([scores.as_dict()[n] for n in names]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [4, 5, 7, 13, 100, 255, 256, 257, 300])
def test_statistics_equal_the_official_ones(length, fill, golden):
    values = fill.uniform(0, f"v{length}", length).numpy().astype(np.float64)
    if length == 13:
        values[[3, 12]] = np.nan
    if length == 7:
        values[2] = 0.5
    expected = golden("davis_statistics__s0").data[f"n{length}"]
    found = measures.statistics(values, eight_bit_bins=True)
    assert np.allclose(found, expected, atol=1e-6, rtol=0, equal_nan=True)
    if length < 256:
        assert np.array_equal(measures.statistics(values), found, equal_nan=True)
    else:
        assert np.isfinite(measures.statistics(values).decay)


def test_official_scores_of_a_published_method(shared_data):
    root = shared_data / "davis"
    scores = score_results(root / "results/semi-supervised/osvos", root / "DAVIS")
    assert scores.j_mean == pytest.approx(0.928402, abs=1e-6)
    assert scores.f_mean == pytest.approx(0.917407, abs=1e-6)
    assert scores.jf_mean == pytest.approx(0.922904, abs=1e-6)
    assert (scores.j_recall, scores.f_recall) == (1, 1)
    assert scores.j_decay == pytest.approx(0.110280, abs=1e-6)
    assert scores.f_decay == pytest.approx(0.169749, abs=1e-6)
    assert list(scores.objects) == ["car-shadow_1"]


def _scene(root, num_frames=6, height=64, width=96, sequence="dot"):
    """A red and a green square that move over a grey texture; returns the labels."""
    rng = np.random.default_rng(0)
    ground = rng.integers(90, 160, (height, width, 1)).repeat(3, 2).astype(np.uint8)
    labels = np.zeros((num_frames, height, width), np.uint8)
    for t in range(num_frames):
        frame = ground.copy()
        for k, (x, y, colour) in enumerate([(20 + 3 * t, 10, (220, 30, 20)), (60 - 2 * t, 36, (20, 200, 40))], 1):
            labels[t, y : y + 16, x : x + 16] = k
            frame[y : y + 16, x : x + 16] = colour
        path = root / "JPEGImages/480p" / sequence / f"{t:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(path)
    write_labels(root / "Annotations/480p" / sequence, [f"{t:05d}" for t in range(num_frames)], labels)
    return labels


def test_perfect_masks_score_one_in_both_tasks(tmp_path):
    labels = _scene(tmp_path)
    swapped = np.array([0, 2, 1], np.uint8)[labels]
    for task, predicted in (("semi-supervised", labels), ("unsupervised", swapped)):
        scores = summarise(score_sequence("dot", predicted, labels, task))
        assert (scores.j_mean, scores.f_mean, scores.jf_mean) == (1, 1, 1)
    assert summarise(score_sequence("dot", swapped, labels)).j_mean == 0
    with pytest.raises(ValueError, match="predicted label 3"):
        score_sequence("dot", labels + (labels == 2), labels)


def _colours(frame):
    """Colour as the feature, 32 channels: enough to tell the squares from the ground."""
    basis = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    return torch.einsum("dc,chw->dhw", basis, 6 * (frame - 0.5)).relu()


PROTOCOL_CASES = {
    "mlp": (_colours, {"fit": ProbeFit(num_steps=150, crop_px=64)}),
    "attention": (
        lambda frame: (_colours(frame)[:, ::8, ::8], _colours(frame)),
        {"fit": ProbeFit(num_steps=150, crop_px=None), "downscale": 2},
    ),
    "propagation": (lambda frame: _colours(frame)[:, ::8, ::8], {"frame_side": 128}),
}


@pytest.mark.parametrize("protocol", PROTOCOL_CASES)
def test_protocols_segment_objects_that_the_features_tell_apart(protocol, tmp_path):
    _scene(tmp_path)
    features, options = PROTOCOL_CASES[protocol]
    seen = []
    scores = evaluate_davis(
        features,
        tmp_path,
        protocol=protocol,
        masks_out=tmp_path / "out",
        progress=lambda done, total, name: seen.append((done, total, name)),
        **options,
    )
    assert scores.j_mean > {"mlp": 0.95, "attention": 0.75, "propagation": 0.6}[protocol]
    assert list(scores.objects) == ["dot_1", "dot_2"] and seen == [(1, 1, "dot")]
    saved = read_labels(sorted((tmp_path / "out/dot").glob("*.png")))
    assert len(saved) == 6 and set(np.unique(saved)) == {0, 1, 2}


def test_a_fitted_probe_is_the_same_every_time(tmp_path):
    _scene(tmp_path, num_frames=3)
    torch.manual_seed(1)
    fit = ProbeFit(num_steps=10, crop_px=64)
    first = evaluate_davis(_colours, tmp_path, fit=fit)
    state = torch.get_rng_state()
    assert evaluate_davis(_colours, tmp_path, fit=fit) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_features_of_inference_mode_can_be_fitted(tmp_path):
    _scene(tmp_path, num_frames=3)
    fit = ProbeFit(num_steps=10, crop_px=64)
    in_inference_mode = torch.inference_mode()(_colours)
    assert evaluate_davis(in_inference_mode, tmp_path, fit=fit) == evaluate_davis(_colours, tmp_path, fit=fit)


def test_features_without_information_score_low(tmp_path):
    _scene(tmp_path)
    flat = evaluate_davis(lambda frame: torch.ones(4, 16, 16), tmp_path, fit=ProbeFit(num_steps=20, crop_px=64))
    assert flat.j_mean < 0.05


def test_binary_masks_are_object_one_and_void_is_kept(shared_data, tmp_path):
    root = shared_data / "davis"
    car = find_sequences(root / "DAVIS")[0].labels()
    assert car.shape == (40, 480, 854) and set(np.unique(car)) == {0, 1}
    found = {s.name: s for s in find_sequences(root / "multi_object_sample")}
    assert set(found) == {"bear", "tennis"}
    assert set(np.unique(found["tennis"].labels())) == {0, 1, 2, 255}
    assert set(np.unique(found["bear"].labels())) == {0, 1}


def test_sequence_lists_and_bad_folders(tmp_path):
    for name in ("a", "b", "c"):
        _scene(tmp_path, num_frames=3, sequence=name)
    assert [s.name for s in find_sequences(tmp_path)] == ["a", "b", "c"]
    (tmp_path / "ImageSets/2017").mkdir(parents=True)
    (tmp_path / "ImageSets/2017/val.txt").write_text("b\nc\n")
    assert [s.name for s in find_sequences(tmp_path)] == ["b", "c"]
    assert [s.name for s in find_sequences(tmp_path, ["a"])] == ["a"]
    with pytest.raises(ValueError, match="sequence z: no png masks .*found a, b, c"):
        find_sequences(tmp_path, ["z"])
    with pytest.raises(ValueError, match="no Annotations and JPEGImages.*found a, b, c"):
        find_sequences(tmp_path / "JPEGImages/480p")
    with pytest.raises(ValueError, match="no such folder"):
        find_sequences(tmp_path / "absent")
    with pytest.raises(ValueError, match="protocol='knn'"):
        evaluate_davis(_colours, tmp_path, protocol="knn")
    (tmp_path / "JPEGImages/480p/b/00001.png").unlink()
    with pytest.raises(ValueError, match="2 frames .* 3 masks .*no frame for 00001"):
        find_sequences(tmp_path, ["b"])


def test_sequences_too_short_to_score_are_refused(shared_data):
    with pytest.raises(ValueError, match="bear has 2 frames"):
        evaluate_davis(_colours, shared_data / "davis/multi_object_sample", ["bear"])
