"""The benchmarks of the Flow Poke Transformer, judged by models whose answers are known."""

import csv
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kinema.configs import EvaluateConfig, PokesConfig, TrackConfig
from kinema.models.fpt.data_rules import central_square
from kinema.models.fpt.mixture import GaussianMixture
from kinema.models.fpt.model import flow_poke_transformer
from kinema.pipelines import track
from kinema.pipelines.evaluate.pokes import parts_data as pokes_parts_data
from kinema.pipelines.evaluate.pokes import stage as stage_module
from kinema.pipelines.evaluate.pokes.data import TrackSamples
from kinema.pipelines.evaluate.pokes.measures import (
    REMOVED_SHARES,
    area_to_oracle,
    average_precision,
    iou_by_threshold,
    sparsification,
)
from kinema.pipelines.evaluate.pokes.parts import PartImage, PartPoke, evaluate_parts
from kinema.pipelines.evaluate.pokes.parts_data import PartFolder, scene_images
from kinema.pipelines.evaluate.pokes.scores import PokeSample, predict_samples, score
from kinema.pipelines.evaluate.stage import run
from kinema.pipelines.loader import ClipIndex
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow

PRIOR, NOISE = 0.1, 0.003
COUNTS = (0, 1, 2, 5, 10)


class RigidParts:
    """The exact posterior of motion that is affine on each part, its coefficients and a little noise normal.

    part_of tells the part at positions [n, 2], given which image it is (the value of its first pixel). `sharper`
    makes the answers surer than they should be.
    """

    def __init__(self, part_of: Callable[[int, np.ndarray], np.ndarray], sharper: float = 1.0):
        self.part_of, self.sharper = part_of, sharper
        self.images_embedded = self.calls = 0

    def embed_image(self, img: Tensor) -> dict[str, Tensor]:
        self.images_embedded += len(img)
        return {"feat": img[:, :1, :1, :1], "pos": img.new_zeros(len(img), 1, 1, 2)}

    def project_image(self, d_img):
        return d_img

    def predict_parallel(self, poke_pos, poke_flow, query_pos, camera_static, d_img) -> GaussianMixture:
        self.calls += 1
        which = d_img["feat"].flatten().expand(len(poke_pos)).round().long().tolist()
        parts = zip(which, poke_pos.double(), poke_flow.double(), query_pos.double(), strict=True)
        mean, variance = (torch.stack(x) for x in zip(*(self._posterior(*part) for part in parts), strict=True))
        scale = (variance.sqrt() / self.sharper)[..., None, None, None] * torch.eye(2).double()
        return GaussianMixture(torch.zeros(*mean.shape[:2], 1).double(), mean[:, :, None], scale)

    def _posterior(self, image: int, pos: Tensor, flow: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        def same(a: Tensor, b: Tensor) -> Tensor:
            return torch.from_numpy(self.part_of(image, a.numpy())[:, None] == self.part_of(image, b.numpy())[None])

        prior = PRIOR**2 * (1 + (queries - 0.5).square().sum(1)) + NOISE**2
        if not len(pos):
            return torch.zeros(len(queries), 2, dtype=torch.float64), prior
        known = _kernel(pos) * same(pos, pos) + NOISE**2 * torch.eye(len(pos)).double()
        gain = torch.linalg.solve(known, _kernel(pos, queries) * same(pos, queries)).T
        return gain @ flow, prior - (gain * (_kernel(queries, pos) * same(queries, pos))).sum(1)


def _kernel(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Covariance of affine motion at positions: shift, and two gradients of a third of its size."""
    b = a if b is None else b
    return PRIOR**2 * (1 + (a - 0.5) @ (b - 0.5).T)


def quarters(image: int, pos: np.ndarray) -> np.ndarray:
    """Four parts: the quarters of the picture."""
    return (pos[:, 0] > 0.5).astype(int) + 2 * (pos[:, 1] > 0.5)


def drawn_samples(num: int, num_pokes: int = 10, num_queries: int = 8) -> list[PokeSample]:
    """Motion drawn from the very distribution that `RigidParts(quarters)` assumes."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(num):
        pos = rng.random((num_pokes + num_queries, 2))
        shift, gradient = rng.normal(0, PRIOR, (4, 2)), rng.normal(0, PRIOR, (4, 2, 2))
        part = quarters(0, pos)
        flow = shift[part] + np.einsum("nij,nj->ni", gradient[part], pos - 0.5) + rng.normal(0, NOISE, pos.shape)
        points = [
            torch.from_numpy(x).float() for x in (pos[:num_pokes], flow[:num_pokes], pos[num_pokes:], flow[num_pokes:])
        ]
        samples.append(PokeSample(f"sample-{number}", torch.zeros(3, 4, 4), *points, camera_static=True))
    return samples


def scores_of(model: RigidParts, samples: list[PokeSample], **settings):
    return score(predict_samples(model, samples, COUNTS, **settings), COUNTS)


@pytest.fixture(scope="module")
def samples() -> list[PokeSample]:
    return drawn_samples(300)


@pytest.fixture(scope="module")
def exact(samples):
    """Scores of the exact model."""
    model = RigidParts(quarters)
    scores = scores_of(model, samples)
    assert model.images_embedded == len(samples)
    return scores


def test_an_exact_model_errs_less_with_every_poke_and_is_calibrated(exact):
    rows, summary = exact.rows, exact.summary
    epe = [row["epe_px"] for row in rows]
    assert all(later < 0.95 * earlier for earlier, later in zip(epe[:-1], epe[1:], strict=True))
    assert epe[0] == pytest.approx(summary["still_epe_px"])  # without pokes its mean is no motion
    # Errors of a normal with deviation s in each direction: s sqrt(pi / 2) on average.
    assert epe[0] == pytest.approx(PRIOR * math.sqrt((1 + 1 / 6) * math.pi / 2) * 512, rel=0.05)
    nll = [row["nll_nats"] for row in rows]
    assert nll == sorted(nll, reverse=True)
    assert all(row["calibration_error"] < 0.025 for row in rows)
    assert summary["spearman_deviation"] > 0.7 and summary["spearman_entropy"] > 0.7
    assert rows[0]["spearman_deviation"] < 0.2 and rows[0]["sparsification_area_deviation"] > 0.3  # nothing is known
    assert rows[-1]["sparsification_area_deviation"] < 0.08
    assert rows[-1]["pck_0.05"] > 0.85 > 0.15 > rows[0]["pck_0.05"]
    assert all(row["epe_px"] < 0.8 * row["nearest_poke_epe_px"] for row in rows[1:])
    assert (summary["samples"], summary["queries"]) == (300, 8)


@pytest.mark.parametrize(("sharper", "side"), [(2.0, -1), pytest.param(0.5, 1, marks=pytest.mark.slow)])
def test_a_model_that_is_too_sure_or_too_unsure_is_seen_as_such(samples, exact, sharper, side):
    other = scores_of(RigidParts(quarters, sharper), samples)
    assert other.summary["calibration_error"] > 0.25
    off = np.array(other.curves["coverage"]["5"]) - np.array(other.curves["probabilities"])
    assert (np.sign(off) == side).all()
    assert [r["epe_px"] for r in other.rows] == [r["epe_px"] for r in exact.rows]
    assert all(o["nll_nats"] > e["nll_nats"] for o, e in zip(other.rows, exact.rows, strict=True))
    assert other.summary["spearman_deviation"] == pytest.approx(exact.summary["spearman_deviation"])


def test_figures_do_not_depend_on_batches_and_follow_the_seed(samples):
    one, many = (predict_samples(RigidParts(quarters), samples[:7], COUNTS, batch_size=b) for b in (1, 4))
    for name, values in vars(one).items():
        np.testing.assert_array_equal(values, getattr(many, name))
    other = predict_samples(RigidParts(quarters), samples[:7], COUNTS, seed=1)
    assert (other.error == one.error).all() and (other.level != one.level).any()
    alone = predict_samples(RigidParts(quarters), samples[3:4], COUNTS)
    np.testing.assert_array_equal(alone.level[0], one.level[3])


def test_samples_with_too_few_pokes_are_refused(samples):
    with pytest.raises(ValueError, match="sample-0 has 10 pokes, 20 are to be shown"):
        predict_samples(RigidParts(quarters), samples, (1, 20))
    with pytest.raises(ValueError, match="no sample"):
        predict_samples(RigidParts(quarters), [], COUNTS)
    with pytest.raises(ValueError, match="sample-0: the model's answer to 1 poke.* not finite"):
        predict_samples(RigidParts(quarters, sharper=math.nan), samples, (1,))


def test_sparsification_of_known_orders():
    error = np.arange(1.0, 101.0)
    perfect = sparsification(error, error)
    assert perfect[0] == 1 and perfect[25] == pytest.approx(25.5 / 50.5)  # the smaller half is left
    np.testing.assert_allclose(sparsification(error, np.ones(100)), 1)
    np.testing.assert_allclose(sparsification(error[::-1], error)[25], 75.5 / 50.5)
    curves = {"oracle": perfect, "flat": np.ones(50)}
    left = 1 - np.array(REMOVED_SHARES)
    area = np.trapezoid(1 - (100 * left + 1) / 101, REMOVED_SHARES) if hasattr(np, "trapezoid") else 0.4753
    assert area_to_oracle(curves, "flat") == pytest.approx(area, abs=1e-3)
    assert area_to_oracle(curves, "oracle") == 0


def test_mask_measures_equal_their_definitions():
    rng = np.random.default_rng(1)
    scores = np.round(rng.random((20, 20)), 1)
    truth = rng.random((20, 20)) < 0.2 + 0.5 * scores
    thresholds = np.array([-1.0, 0.05, 0.5, 0.6, 2.0])
    expected = [(truth & (scores >= t)).sum() / (truth | (scores >= t)).sum() for t in thresholds]
    np.testing.assert_allclose(iou_by_threshold(scores, truth, thresholds), expected)
    levels = np.unique(scores)[::-1]
    precision = [truth[scores >= t].mean() for t in levels]
    recall = np.array([truth[scores >= t].sum() for t in levels]) / truth.sum()
    assert average_precision(scores, truth) == pytest.approx((np.diff(recall, prepend=0) * precision).sum())
    assert average_precision(truth.astype(float), truth) == 1


def scene_parts(scenes: dict[int, Scene], frames: dict[int, int]) -> Callable[[int, np.ndarray], np.ndarray]:
    """Rigid parts of rendered scenes at positions of their square."""
    maps = {number: scene.part_ids(frames[number]) for number, scene in scenes.items()}

    def part_of(image: int, pos: np.ndarray) -> np.ndarray:
        top, left, side = central_square(*maps[image].shape)
        column, row = (np.clip((pos * side).astype(int), 0, side - 1)).T
        return maps[image][top + row, left + column]

    return part_of


def test_on_a_rendered_scene_the_exact_parts_predict_better_with_every_poke():
    scene = Scene(311, 96, 128, num_frames=13, num_objects=4)
    part_of = scene_parts({0: scene}, {0: 0})
    flow_norm = scene.flow_px(0, 12) / 96
    rng = np.random.default_rng(2)
    tests = []
    for number in range(6):
        points = rng.integers((16, 0), (112, 96), (140, 2))
        pos = torch.from_numpy((points - [16, 0] + 0.5) / 96).float()
        flow = torch.from_numpy(flow_norm[:, points[:, 1], points[:, 0]].T).float()
        tests.append(PokeSample(str(number), torch.zeros(3, 4, 4), pos[:100], flow[:100], pos[100:], flow[100:], False))
    counts = (1, 10, 100)
    rows = score(predict_samples(RigidParts(part_of), tests, counts), counts).rows
    assert rows[0]["epe_px"] > 2 * rows[1]["epe_px"] > 4 * rows[2]["epe_px"]
    assert rows[2]["epe_px"] < rows[2]["nearest_poke_epe_px"]


def test_the_part_that_a_poke_moves_is_found_on_rendered_scenes():
    images = list(scene_images(4, gap_s=0.5))
    assert len(images) == 4 and sum(len(image.pokes) for image in images) >= 8

    class Marked(RigidParts):
        """Knows each image by the order in which it comes."""

        def embed_image(self, img: Tensor) -> dict[str, Tensor]:
            d_img = super().embed_image(img)
            return {**d_img, "feat": torch.full_like(d_img["feat"], self.images_embedded - 1)}

    def part_of(number: int, pos: np.ndarray) -> np.ndarray:
        image = images[number]
        column, row = np.clip((pos * 256).astype(int), 0, 255).T
        labels = np.zeros((256, 256), int)
        for part, poke in enumerate(image.pokes, 1):
            labels[poke.mask] = part
        return labels[row, column]

    model = Marked(part_of)
    scores = evaluate_parts(model, images, grid=64)
    assert {result.image: result.split for result in scores.results} == dict(
        zip([image.name for image in images], ["tune", "test"] * 2, strict=True)
    )
    flat = scores.flat()
    assert flat["miou"] > 0.85 and flat["average_precision"] > 0.95
    assert flat["everything_miou"] < 0.1 and flat["best_threshold_miou"] >= flat["miou"]
    assert model.images_embedded == 4 and model.calls == 8  # per image: once without pokes, once with all of them

    one_part = Marked(lambda number, pos: np.zeros(len(pos)))
    assert evaluate_parts(one_part, images, grid=32).flat()["miou"] < flat["miou"] / 2
    fixed = evaluate_parts(Marked(part_of), images, grid=32, threshold_nats=0.7)
    assert fixed.threshold_nats == 0.7 and len(fixed.of("test")) == len(fixed.results)
    in_pieces = evaluate_parts(Marked(part_of), images, grid=32, threshold_nats=0.7, batch_size=1)
    assert all((a.iou == b.iou).all() for a, b in zip(fixed.results, in_pieces.results, strict=True))


def test_parts_need_images_to_tune_and_test_on_and_masks_that_fit():
    frame = np.zeros((6, 8, 3), np.uint8)
    part = np.zeros((6, 6), bool)
    part[:3] = True
    image = PartImage("a", frame, (PartPoke((0.5, 0.2), (0.1, 0.0), part),))
    with pytest.raises(ValueError, match="no image to test on"):
        evaluate_parts(RigidParts(quarters), [image], grid=4)
    with pytest.raises(ValueError, match="no image to choose"):
        evaluate_parts(RigidParts(quarters), [PartImage("a", frame, image.pokes, split="test")], grid=4)
    for mask, message in ((part[:, :5], r"mask 0 is \[6, 5\], the central square is 6 x 6"), (~part & part, "empty")):
        with pytest.raises(ValueError, match=message):
            evaluate_parts(RigidParts(quarters), [PartImage("a", frame, (PartPoke((0.5, 0.2), (0.1, 0.0), mask),))])


@pytest.fixture
def part_folder(tmp_path):
    """Two images of 40 x 48 with a square part in colour, grey and palette, as a user would bring them."""
    rng = np.random.default_rng(3)
    folder = tmp_path / "drags"
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    mask = np.zeros((40, 48), np.uint8)
    mask[10:20, 14:24] = 1
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(folder / "images" / f"{name}.png")
    Image.fromarray(mask * 255).save(folder / "masks" / "grey.png")
    palette = Image.fromarray(mask * 3)
    palette.putpalette([0, 0, 0] * 256)
    palette.save(folder / "masks" / "palette.png")
    Image.fromarray(np.stack([mask * 0, mask * 0, mask * 200], axis=2)).save(folder / "masks" / "colour.png")
    write_pokes(folder, [[f"images/{i}.png", 18, 14, 23, 14, f"masks/{m}.png"] for i, m in
                         (("a", "grey"), ("b", "palette"), ("a", "colour"))])  # fmt: skip
    return folder


def write_pokes(folder, rows, header="image,x,y,end_x,end_y,mask"):
    with (folder / "pokes.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([header.split(","), *rows])


def test_a_folder_is_read_as_documented(part_folder):
    images = list(PartFolder(part_folder))
    assert [(image.name, len(image.pokes), image.split) for image in images] == [
        ("images/a.png", 2, None),
        ("images/b.png", 1, None),
    ]
    for image in images:
        for poke in image.pokes:
            np.testing.assert_allclose(poke.pos, ((18 - 4 + 0.5) / 40, (14 + 0.5) / 40))
            np.testing.assert_allclose(poke.flow, (5 / 40, 0), atol=1e-12)
            assert poke.mask.shape == (40, 40) and poke.mask[10:20, 10:20].all() and poke.mask.sum() == 100


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("image,x,y,mask", [], "no column end_x, end_y"),
        ("", [], "no poke"),
        ("", ["images/a.png", 18], "line 2: y, end_x, end_y, mask empty"),
        ("", ["images/c.png", 18, 14, 23, 14, "masks/grey.png"], "line 2: .*c.png cannot be read"),
        ("", ["images/a.png", 18, 14, 23, 14, "pokes.csv"], "line 2: .*pokes.csv cannot be read"),
        ("", ["images/a.png", "x", 14, 23, 14, "masks/grey.png"], "line 2: x='x' is no number"),
        ("", ["images/a.png", 2, 14, 23, 14, "masks/grey.png"], "line 2: the poke begins outside"),
        ("", ["images/a.png", 18, 14, 23, 14, "images/small.png"], r"is \[5, 5\], its image \[40, 48\]"),
        (
            "image,x,y,end_x,end_y,mask,split",
            ["images/a.png", 18, 14, 23, 14, "masks/grey.png", "val"],
            "split='val'; use",
        ),
    ],
)
def test_what_is_wrong_in_a_folder_is_named(part_folder, header, row, message):
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(part_folder / "images" / "small.png")
    write_pokes(part_folder, [row] if row else [], header or "image,x,y,end_x,end_y,mask")
    with pytest.raises(ValueError, match=message):
        list(PartFolder(part_folder))


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """Clips of three scenes and their tracks, as the stages write them."""
    folder = tmp_path_factory.mktemp("tracked")
    scenes = [Scene(640 + n, 96, 128, num_frames=frames, fps=12) for n, frames in enumerate((14, 16, 4))]
    clips = write_scene_clips(scenes, folder / "clips")
    write_scene_flow(scenes, clips, folder / "flow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINEMA_ENGINE", "serial")
        track.run(
            TrackConfig(clips=str(folder / "clips"), flow=str(folder / "flow"), out=str(folder / "tracks"), grid=12)
        )
    return folder, scenes


def test_samples_from_tracks_hold_the_scenes_motion(tracked):
    folder, scenes = tracked
    index = ClipIndex.open(folder / "clips", None, folder / "tracks")
    settings = {"num_queries": 16, "gap_s": 0.5, "image_px": 64}
    data = TrackSamples(index, (0, 1, 5, 500), draws_per_clip=2, **settings)
    assert data.counts == (0, 1, 5) and data.left_out == {"clip shorter than the time gap": 1}
    found = list(data)
    assert len(found) == len(data) == 4 and len({sample.key for sample in found}) == 4
    for sample, drawn in zip(found, data.drawn, strict=True):
        scene = scenes[int(index.clip(drawn.clip).row["source"].removeprefix("scene-")) - 640]
        pos = torch.cat([sample.query_pos, sample.poke_pos])
        flow = torch.cat([sample.query_flow, sample.poke_flow])
        assert sample.image.shape == (3, 64, 64) and len(pos) == 21 and len(pos.unique(dim=0)) == 21
        tracks, _ = scene.tracks(pos.numpy() * 96 - 0.5 + [16, 0], drawn.start)
        truth = (tracks[drawn.end] - tracks[drawn.start]) / 96
        assert np.median(np.linalg.norm(flow.numpy() - truth, axis=1)) < 0.5 / 96
    again = list(TrackSamples(index, (0, 1, 5, 500), draws_per_clip=2, **settings))
    assert all((a.poke_pos == b.poke_pos).all() for a, b in zip(found, again, strict=True))
    other = list(TrackSamples(index, (0, 1, 5), seed=1, **settings))
    assert not (found[0].poke_pos == other[0].poke_pos).all()
    assert len(TrackSamples(index, (1,), max_clips=2, **settings)) <= 2


def test_clips_without_enough_tracks_are_a_loud_error(tracked):
    folder, _ = tracked
    index = ClipIndex.open(folder / "clips", None, folder / "tracks")
    with pytest.raises(ValueError, match=r"no clip gives 500 queries.*1 clip shorter.*2 too few"):
        TrackSamples(index, (1, 2), num_queries=500, gap_s=0.5)


@pytest.fixture(scope="module")
def small_network(tmp_path_factory):
    """Weights of an untrained small network, in a file."""
    torch.manual_seed(0)
    model = flow_poke_transformer("fpt_tiny")
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save({"model": model.state_dict()}, path)
    return str(path)


@pytest.fixture(scope="module")
def tracking_store(tmp_path_factory):
    """One database for the tests of the command: making it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
        yield


@pytest.mark.usefixtures("tracking_store")
def test_command_pokes_writes_table_curves_and_pictures(tracked, small_network, tmp_path):
    folder, _ = tracked
    config = EvaluateConfig(
        model="fpt_tiny",
        weights=small_network,
        benchmark="pokes",
        clips=str(folder / "clips"),
        tracks=str(folder / "tracks"),
        out=str(tmp_path / "out"),
        pokes=PokesConfig(gap_s=0.5, num_queries=16, counts=(0, 1, 10), num_examples=1),
    )
    summary = run(config)
    assert {"pokes_0_epe_px", "pokes_10_nll_nats", "pokes_1_pck_0.05", "pokes_calibration_error"} <= set(
        summary.metrics
    )
    assert summary.metrics["pokes_samples"] == 2 and all(type(v) is float for v in summary.metrics.values())
    with (tmp_path / "out" / "pokes.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [row["pokes"] for row in rows] == ["0", "1", "10"]
    assert float(rows[2]["epe_px"]) == pytest.approx(summary.metrics["pokes_10_epe_px"])
    curves = json.loads((tmp_path / "out" / "pokes.json").read_text())
    assert len(curves["coverage"]["10"]) == len(curves["probabilities"]) and "512 x 512" in curves["units"]["epe_px"]
    assert curves["rows"][0]["nearest_poke_epe_px"] is None
    assert (
        json.loads((tmp_path / "out" / "table.json").read_text())["pokes_10_epe_px"]
        == summary.metrics["pokes_10_epe_px"]
    )
    for name in ("error", "calibration", "sparsification", "example_0"):
        picture = np.asarray(Image.open(tmp_path / "out" / f"{name}.png"))
        assert min(picture.shape[:2]) > 200 and picture.std() > 5
    assert not list((tmp_path / "out").glob(".*partial"))


@pytest.mark.usefixtures("tracking_store")
def test_command_moving_part_reads_scenes_and_folders(small_network, part_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pokes_parts_data, "SCENE_SIDE_PX", 96)
    for data in ("scenes", str(part_folder)):
        settings = PokesConfig(gap_s=0.5, grid=8, num_scenes=3, num_examples=1)
        out = tmp_path / "out"
        config = EvaluateConfig(
            model="fpt_tiny", weights=small_network, benchmark="moving_part", data=data, out=str(out), pokes=settings
        )
        metrics = run(config).metrics
        assert 0 <= metrics["moving_part_miou"] <= metrics["moving_part_best_threshold_miou"] <= 1
        with (out / "moving_part.csv").open() as handle:
            rows = list(csv.DictReader(handle))
        test = [float(row["iou"]) for row in rows if row["split"] == "test"]
        assert np.mean(test) == pytest.approx(metrics["moving_part_miou"]) and len(test) == metrics["moving_part_pokes"]
        assert (out / "iou_over_threshold.png").is_file() and (out / "example_0.png").is_file()
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"benchmark": "pokes", "model": "fpt_tiny"}, "clips= or tracks= is empty"),
        ({"benchmark": "moving_part", "model": "fpt_tiny"}, "data is empty"),
        (
            {"benchmark": "moving_part", "model": "run", "weights": "w.pt", "data": "scenes"},
            "weights=w.pt goes with a name",
        ),
        ({"benchmark": "moving_part", "model": "fpt_base", "data": "nowhere"}, "nowhere/pokes.csv: no such file"),
        (
            {"benchmark": "moving_part", "model": "raft", "data": "scenes"},
            "model=raft is a RAFT, which gives flow; this",
        ),
    ],
)
def test_command_says_what_is_missing(settings, message):
    with pytest.raises(ValueError, match=message):
        run(EvaluateConfig(**settings))


def test_a_run_of_another_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("kinema.pipelines.model_address.resolve_checkpoint", lambda path: path)
    monkeypatch.setattr("kinema.pipelines.model_address.read_meta", lambda path: {"train_config": {"model": "raft"}})
    with pytest.raises(ValueError, match="is a RAFT, which gives flow; this benchmark takes"):
        stage_module.load_poke_model(str(tmp_path))
