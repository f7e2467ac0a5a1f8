"""The page of `kinema demo fpt` over HTTP: what it answers, and what it refuses."""

import asyncio
import http.client
import io
import json
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from kinema.configs import PageConfig, build
from kinema.configs.describe import describe
from kinema.models.backbones.inference_linear import Bf16Linear, Fp16WeightLinear, can_keep_fp16
from kinema.models.fpt import model as fpt
from kinema.models.fpt.mixture import GaussianMixture
from kinema.pipelines import page, precision
from kinema.pipelines.page import pictures
from kinema.pipelines.page.predictor import Abandoned, NotFinite, Predictor, grid_points
from kinema.pipelines.page.questions import Question, decode_upload
from kinema.pipelines.page.turns import Stale, Turns

from .served_page import MEGABYTE, MINIATURE, Served, encoded, random_model, two_clips

POKES = [[0.3, 0.4, 0.2, -0.1], [0.7, 0.6, 0.0, 0.1]]


@pytest.fixture(scope="module")
def model(fill):
    return random_model(fill)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return two_clips(tmp_path_factory.mktemp("page") / "clips")


@pytest.fixture(scope="module")
def served(model, clips):
    served = Served(Predictor(model, cached_images=3), clips)
    yield served
    served.close()


@pytest.fixture(scope="module")
def example(served):
    """`example()` -> the id of an image that is in memory."""
    return lambda: served.post("/api/example", {"number": 3})["image"]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def direct(model, server, image, pokes, points, static=True):
    """The model's own answer about an image that the page knows."""
    features = server._predictor.image(image).features
    pokes = torch.tensor(pokes, dtype=torch.float32).view(1, -1, 4)
    with torch.inference_mode():
        return model.predict_parallel(pokes[..., :2], pokes[..., 2:], points[None], static, features)[0]


def test_the_page_needs_nothing_but_its_own_files(served):
    _, headers, index = served.ask("GET", "/")
    assert headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    found = set(re.findall(r'(?:src|href)="([^"]+)"', index.decode())) - {"data:,"}
    scripts = found | set()
    for name in found:
        status, headers, data = served.ask("GET", f"/{name}")
        assert status == 200 and len(data) > 100, name
        if name.endswith(".js"):
            scripts |= set(re.findall(r'from "\./([^"]+)"', data.decode()))
    assert {"page.js", "stage.js", "drawing.js", "requests.js", "page.css"} <= scripts
    for name in scripts:
        status, _, data = served.ask("GET", f"/{name}")
        assert status == 200, name
        outside = set(re.findall(rb"https?://[\w.]+", data)) - {b"http://www.w3.org"}
        assert not outside, (name, outside)


def test_an_image_is_cut_to_its_central_square(served):
    wide = noise(40, 60)
    answer = served.post("/api/image", encoded(wide))
    assert answer["side_px"] == 40 and answer["milliseconds"] > 0
    _, _, shown = served.ask("GET", f"/api/image/{answer['image']}")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(shown))), wide[:, 10:50])
    assert served.post("/api/image", encoded(wide))["image"] == answer["image"]


def test_pictures_of_phones_and_scanners_are_read():
    plain = noise(32, 48)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise
    data = encoded(plain, exif=turned)
    np.testing.assert_array_equal(decode_upload(data, 1.0), np.rot90(plain, -1)[8:40])
    grey16 = (plain[..., 0].astype(np.uint16) << 8) + 17
    np.testing.assert_array_equal(decode_upload(encoded(grey16), 1.0)[..., 1], plain[:, 8:40, 0])
    clear = np.dstack([plain, np.zeros((32, 48), np.uint8)])
    assert (decode_upload(encoded(clear), 1.0) == 255).all()
    multi = io.BytesIO()
    Image.fromarray(plain).save(multi, "MPO", save_all=True, append_images=[Image.fromarray(plain)])
    assert decode_upload(multi.getvalue(), 1.0).shape == (32, 32, 3)
    large = np.full((2100, 2200, 3), 77, np.uint8)
    assert decode_upload(encoded(large), 10.0).shape == (1050, 1050, 3)


def animated(kind):
    buffer, frames = io.BytesIO(), [Image.fromarray(noise(32, 32, seed)) for seed in range(3)]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def claims_size(width, height):
    """A PNG of a few bytes that says it is large."""
    png = encoded(np.zeros((8, 8), np.uint8))
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


REFUSED = {
    "text": (b"GIF or not? no.", 415, "not a picture"),
    "nothing": (b"", 415, "empty"),
    "animated gif": (lambda: animated("GIF"), 415, "not a picture"),
    "animated png": (lambda: animated("PNG"), 415, "animated"),
    "animated webp": (lambda: animated("WEBP"), 415, "animated"),
    "tiff": (lambda: encoded(noise(32, 32), "TIFF"), 415, "not a picture"),
    "cut jpeg": (lambda: encoded(noise(64, 64), "JPEG")[:900], 415, "not a picture"),
    "cut png": (lambda: encoded(noise(64, 64))[:900], 415, "not a picture"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "not a picture"),
    "tiny": (lambda: encoded(noise(4, 4)), 415, "4 x 4"),
    "too many pixels": (lambda: encoded(np.zeros((1001, 1000, 3), np.uint8)), 413, "1000 x 1001"),
    "bomb": (lambda: claims_size(30_000, 30_000), 413, "million"),
    "too many bytes": (bytes(MEGABYTE + 1), 413, "larger than 1 MB"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_small_still_picture_is_refused(name, served):
    data, status, says = REFUSED[name]
    found, headers, answer = served.ask("POST", "/api/image", data() if callable(data) else data)
    assert (found, headers["Content-Type"]) == (status, "application/json")
    assert says in answer["error"] and "Traceback" not in answer["error"]


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("field", b"{", "not JSON"),
        ("field", [1], "not an object"),
        ("field", {"image": "../../etc/passwd"}, "not the id of an image"),
        ("field", {"pokes": [[0, 0, 0]]}, "4 numbers"),
        ("field", {"pokes": [[0, 0, 0, "1"]]}, "4 numbers"),
        ("field", {"pokes": [[0, 1.5, 0, 0]]}, "outside the image"),
        ("field", {"pokes": [[0, 0, 9, 0]]}, "longer than 2"),
        ("field", b'{"image": "%s", "pokes": [[0, 0, NaN, 0]]}' % (b"0" * 32), "not finite"),
        ("field", {"pokes": [[0, 0, 0, 0]] * 129}, "at most 128"),
        ("field", {"side": 1000}, "from 1 to 64"),
        ("field", {"side": True}, "side=True"),
        ("field", {"static": "yes"}, "true or false"),
        ("point", {}, "point must be a list of 2 numbers"),
        ("point", {"point": [0.5, -0.1]}, "outside the image"),
        ("samples", {"samples": 0}, "from 1 to 32"),
        ("samples", {"seed": -1}, "seed=-1"),
        ("frame", {"clip": -1}, "clip=-1"),
        ("frame", {"clip": 0, "frame": "1"}, "frame='1'"),
    ],
)
def test_malformed_questions_say_what_is_wrong(path, body, says, served, example):
    if isinstance(body, dict) and path != "frame":
        body = {"image": example()} | body
    status, _, answer = served.ask("POST", f"/api/{path}", body)
    assert status == 400 and says in answer["error"]


def test_a_question_above_the_limit_is_refused(served):
    assert served.ask("POST", "/api/field", bytes(70_000))[0] == 413


def test_only_this_machine_and_this_page_are_answered(served):
    port = served.port
    for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", "localhost.evil", ""):
        status, _, answer = served.ask("GET", "/api/state", host=host or " ")
        assert status == 403 and "model" not in answer, host
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", "localhost:9000"):
        assert served.ask("GET", "/api/state", host=host)[0] == 200
    for origin in ("http://evil.example", "null", "http://localhost:3000", f"https://127.0.0.1:{port}"):
        assert served.ask("POST", "/api/example", {}, Origin=origin)[0] == 403, origin
    assert served.ask("POST", "/api/example", {"number": 3}, Origin=f"http://127.0.0.1:{port}")[0] == 200
    assert served.ask("GET", "/api/state", Sec_Fetch_Site="cross-site")[0] == 403
    assert served.ask("GET", "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200


@pytest.mark.parametrize(
    "path",
    ["/static/page.js", "/../page.js", "/..%2f..%2fserver.py", "/api/image/..%2fx", "/api/clips/0/99", "/nothing"],
)
def test_other_paths_are_not_found(path, served):
    status, _, answer = served.ask("GET", path)
    assert status in (404, 410) and "error" in answer


def test_the_mean_flow_is_the_models(served, model, example):
    image = example()
    answer = served.post("/api/field", {"image": image, "pokes": POKES, "static": True, "side": 6})
    expected = direct(model, served.server, image, POKES, grid_points(6)).mean.view(6, 6, 2)
    np.testing.assert_allclose(answer["flow"], expected, atol=1e-5)
    assert answer["full_colour"] == pytest.approx(float(expected.norm(dim=-1).max()), abs=1e-5)
    assert answer["queries"] == 36 and answer["queries_per_second"] > 0 and answer["milliseconds"] > 0
    assert "heat_picture" not in answer
    moving = served.post("/api/field", {"image": image, "pokes": POKES, "static": False, "side": 6})
    assert moving["flow"] != answer["flow"]


def test_pokes_inform_and_no_pokes_do_not(served, model, example):
    ask = {"image": example(), "side": 6, "information": True}
    assert served.server._predictor.field(Question(ask["image"], (), False), 6, True).information.max() == 0
    found = served.server._predictor.field(Question(ask["image"], tuple(map(tuple, POKES)), False), 6, True)
    given = direct(model, served.server, ask["image"], POKES, grid_points(6), static=False)
    without = direct(model, served.server, ask["image"], [], grid_points(6), static=False)
    exact = given.kl_divergence(without, 4096, torch.Generator().manual_seed(1)).view(6, 6)
    assert exact.max() > 0.05
    np.testing.assert_allclose(found.information, exact, atol=0.1 * float(exact.max()))
    assert served.post("/api/field", ask | {"pokes": POKES})["hottest_nats"] == pytest.approx(
        float(found.information.max()), abs=1e-3
    )


def test_a_points_distribution_is_the_models(served, model, example):
    image, point = example(), [0.61, 0.65]
    answer = served.post("/api/point", {"image": image, "pokes": POKES, "static": True, "point": point})
    one = direct(model, served.server, image, POKES, torch.tensor([point]))[0]
    np.testing.assert_allclose(answer["mean"], one.mean, atol=1e-5)
    np.testing.assert_allclose(answer["deviation"], one.variance.sqrt(), atol=1e-5)
    assert answer["entropy_nats"] == pytest.approx(float(one.entropy(4096)), abs=0.05)
    pixel = 2 * answer["reach"] / pictures.DENSITY_PX
    np.testing.assert_allclose(answer["modes"][0][:2], one.mode(), atol=1.5 * pixel)
    assert answer["queries"] == 1 and answer["picture"].startswith("data:image/png;base64,")


def test_samples_follow_the_distribution_and_the_seed(served, model, example):
    ask = {"image": example(), "pokes": POKES, "static": True, "side": 3, "samples": 32}
    several = np.concatenate([served.post("/api/samples", ask | {"seed": s})["flow"] for s in range(30)])  # [960, 9, 2]
    exact = direct(model, served.server, ask["image"], POKES, grid_points(3))
    error = np.abs(several.mean(0) - exact.mean.numpy())
    assert (error < 5 * exact.variance.sqrt().numpy() / np.sqrt(len(several))).all()
    assert served.post("/api/samples", ask | {"seed": 1})["flow"] == several[32:64].tolist()


def test_joint_samples_differ_from_independent_ones_and_follow_the_seed(served, example):
    ask = {"image": example(), "pokes": POKES, "side": 3, "samples": 2, "seed": 5, "joint": True}
    first, again = (served.post("/api/samples", ask) for _ in range(2))
    assert np.shape(first["flow"]) == (2, 9, 2) and first["queries"] == 18
    assert first["flow"] == again["flow"] and first["flow"][0] != first["flow"][1]
    assert first["flow"] != served.post("/api/samples", ask | {"joint": False})["flow"]


def test_frames_of_clips_can_be_chosen(served, clips):
    listed = served.ask("GET", "/api/clips?start=0")[2]
    assert listed["total"] == 2 and [clip["frames"] for clip in listed["clips"]] == [6, 6]
    assert "scene-2" in listed["clips"][1]["label"]
    square = clips.clip(1).frames([4])[0][:, 8:72]
    preview = np.asarray(Image.open(io.BytesIO(served.ask("GET", "/api/clips/1/4")[2])))
    np.testing.assert_array_equal(preview, square)
    for clip, frame, says in ((7, 0, "there is no clip 7; there are 2"), (0, 6, "clip 0 has no frame 6")):
        for method, path, body in (
            ("GET", f"/api/clips/{clip}/{frame}", None),
            ("POST", "/api/frame", {"clip": clip, "frame": frame}),
        ):
            status, _, answer = served.ask(method, path, body)
            assert status == 404 and says in answer["error"]
    image = served.post("/api/frame", {"clip": 1, "frame": 4})["image"]
    np.testing.assert_array_equal(served.server._predictor.image(image).square, square)


def test_old_images_are_dropped_and_said_to_be_gone(served, example):
    first = example()
    others = [served.post("/api/image", encoded(noise(32, 32, seed)))["image"] for seed in range(3)]
    status, _, answer = served.ask("POST", "/api/field", {"image": first})
    assert status == 410 and answer["gone"]
    assert served.ask("POST", "/api/field", {"image": others[-1], "side": 4})[0] == 200


def test_a_failure_nobody_foresaw_is_one_line(served, example, monkeypatch, capfd):
    image = example()
    monkeypatch.delenv("KINEMA_DEBUG", raising=False)
    monkeypatch.setattr(served.server._predictor, "field", lambda *_: {}["surprise"])
    status, _, answer = served.ask("POST", "/api/field", {"image": image})
    assert status == 500 and answer["error"] == "this failed with KeyError; the terminal says more"
    assert capfd.readouterr().err.strip() == "kinema demo: /api/field: KeyError: 'surprise'"


async def stays():
    return False


def test_a_newer_request_takes_the_place_of_older_ones():
    order, begun, go = [], threading.Event(), threading.Event()

    def slow(abandoned):
        begun.set()
        go.wait(10)
        order.append("slow")
        return abandoned()

    def quick(name):
        return lambda abandoned: order.append(name)

    async def scenario():
        turns = Turns()
        running = asyncio.ensure_future(turns.run("a", "field", slow, stays))
        await asyncio.to_thread(begun.wait, 10)
        old = asyncio.ensure_future(turns.run("a", "field", quick("old"), stays))
        other = asyncio.ensure_future(turns.run("b", "field", quick("other page"), stays))
        point = asyncio.ensure_future(turns.run("a", "point", quick("other kind"), stays))
        await asyncio.sleep(0)
        new = asyncio.ensure_future(turns.run("a", "field", quick("new"), stays))
        await asyncio.sleep(0)
        go.set()
        results = await asyncio.gather(running, old, other, point, new, return_exceptions=True)
        turns.close()
        return results

    results = asyncio.run(scenario())
    assert results[0] is True, "what was running is told to give up"
    assert isinstance(results[1], Stale)
    assert order == ["slow", "other page", "other kind", "new"]


def test_work_for_a_client_that_has_gone_is_given_up():
    seen = []

    def until_abandoned(abandoned):
        while not abandoned():
            time.sleep(0.005)
        seen.append("abandoned")

    async def leaves():
        seen.append("asked")
        return len(seen) > 1

    async def scenario():
        turns = Turns()
        await turns.run("a", "samples", until_abandoned, leaves)
        turns.close()
        with pytest.raises(Stale):
            await turns.run("a", "samples", until_abandoned, stays)

    asyncio.run(scenario())
    assert seen == ["asked", "asked", "abandoned"]


def test_a_prediction_is_given_up_in_the_middle(model):
    predictor = Predictor(model)
    seen = predictor.look(noise(48, 48))
    question, calls = Question(seen.id, (), True), []

    def after_ten_layers():
        calls.append(1)
        return len(calls) > 10

    with pytest.raises(Abandoned):
        predictor.samples(question, 16, 1, joint=True, seed=0, abandoned=after_ten_layers)
    assert len(calls) == 11
    assert predictor.field(question, 4, information=False).mean.shape == (4, 4, 2)


def mixture(*parts):
    """(weight, x, y, deviation) each."""
    weight, x, y, deviation = torch.tensor(parts, dtype=torch.float64).unbind(1)
    return GaussianMixture(weight.log(), torch.stack([x, y], -1), deviation[:, None, None] * torch.eye(2).double())


def test_density_pictures_find_peaks_narrower_than_a_pixel():
    found = pictures.density_of(mixture((0.7, 0.3, -0.2, 1e-4), (0.3, -0.5, 0.1, 1e-4)))
    assert found.reach == pytest.approx(0.55, abs=0.01)
    pixel = 2 * found.reach / pictures.DENSITY_PX
    places, heights = [mode[:2] for mode in found.modes], [mode[2] for mode in found.modes]
    np.testing.assert_allclose(places, [(0.3, -0.2), (-0.5, 0.1)], atol=pixel)
    np.testing.assert_allclose(heights, [1, 3 / 7], rtol=0.25)
    row, column = (round((v + found.reach) / pixel - 0.5) for v in (-0.2, 0.3))
    assert found.picture[row - 1 : row + 2, column - 1 : column + 2, 3].max() > 200
    assert found.picture[0, 0, 3] == 0


def test_motion_beyond_the_density_picture_has_no_mode_in_it():
    found = pictures.density_of(mixture((1.0, 3.0, 0.0, 0.001)))
    assert found.reach == pictures.LARGEST_REACH and found.modes == []
    assert np.isfinite(found.picture).all()


def test_a_diverged_model_is_named(model, fill):
    broken = random_model(fill)
    predictor = Predictor(broken)
    image = predictor.look(noise(48, 48)).id
    with torch.no_grad():
        broken.out_mlp[-1].bias.fill_(float("nan"))
    with pytest.raises(NotFinite, match="diverged"):
        predictor.field(Question(image, (), True), 4, information=False)


def test_density_pictures_show_the_credible_regions():
    found = pictures.density_of(mixture((1.0, 0.0, 0.0, 0.1)))
    assert found.modes == [(0, 0, 1)] and found.reach == pytest.approx(1.1 * 2.5 * 0.1 * 2**0.5)
    pixel = 2 * found.reach / pictures.DENSITY_PX
    white = (found.picture == (255, 255, 255, 230)).all(-1)
    middle = np.flatnonzero(white[pictures.DENSITY_PX // 2, pictures.DENSITY_PX // 2 :]) * pixel
    expected = [0.1 * (-2 * np.log(1 - p)) ** 0.5 for p in pictures.REGIONS]
    np.testing.assert_allclose(middle, expected, atol=1.5 * pixel)


def test_tiny_motion_and_information_look_like_none():
    assert pictures.full_colour(np.full((4, 4, 2), 1e-5)) == pictures.SMALLEST_FULL_COLOUR
    heat, hottest = pictures.heat_overlay(np.full((4, 4), 1e-6))
    assert hottest == pictures.SMALLEST_FULL_HEAT_NATS and heat[..., 3].max() < 5
    assert pictures.heat_overlay(np.eye(4))[0][:, :, 3].max() > 200


def test_weights_are_loaded_and_wrong_ones_refused(model, tmp_path, monkeypatch):
    monkeypatch.setitem(fpt.PRESETS, "fpt_tiny", MINIATURE)
    torch.save({"model": model.state_dict()}, tmp_path / "good.pt")
    loaded = page.load_page_model("fpt_tiny", str(tmp_path / "good.pt"))
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
    state = model.state_dict()
    del state["cond_emb.weight"]
    torch.save({"model": state}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"cond_emb\.weight"):
        page.load_page_model("fpt_tiny", str(tmp_path / "bad.pt"))
    with pytest.raises(ValueError, match="does not exist"):
        page.load_page_model(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="has its own"):
        page.load_page_model(str(tmp_path), str(tmp_path / "good.pt"))
    server = page.make_server(build(PageConfig, {}, ["model=fpt_tiny"]))
    assert server.facts.untrained and "UNTRAINED" in server.facts.note
    server = page.make_server(build(PageConfig, {}, ["model=fpt_tiny", f"weights={tmp_path / 'good.pt'}"]))
    assert not server.facts.untrained and server.facts.note == ""


def test_products_in_bf16_where_asked_for_and_possible(monkeypatch):
    """A CPU that only emulates them is refused."""
    monkeypatch.setitem(fpt.PRESETS, "fpt_tiny", MINIATURE)
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    with pytest.raises(ValueError, match="precision=bf16: this CPU only emulates"):
        page.make_server(build(PageConfig, {}, ["model=fpt_tiny", "precision=bf16", "device=cpu"]))
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    models = []

    def note(model, *rest):
        models.append(model)
        return Predictor(model, *rest)

    monkeypatch.setattr(page, "Predictor", note)
    page.make_server(build(PageConfig, {}, ["model=fpt_tiny", "device=cpu"]))
    page.make_server(build(PageConfig, {}, ["model=fpt_tiny", "precision=bf16", "device=cpu"]))
    narrow = [any(isinstance(part, Bf16Linear) for part in model.modules()) for model in models]
    assert narrow == [False, True]


def test_weights_in_fp16_where_asked_for_and_possible(monkeypatch):
    monkeypatch.setitem(fpt.PRESETS, "fpt_tiny", MINIATURE)
    config = build(PageConfig, {}, ["model=fpt_tiny", "precision=fp16_weights", "device=cpu"])
    if can_keep_fp16():
        model = page.make_server(config)._predictor.model
        assert any(isinstance(part, Fp16WeightLinear) for part in model.modules())
    monkeypatch.setattr(page, "can_keep_fp16", lambda: False)
    with pytest.raises(ValueError, match="precision=fp16_weights is for x86 CPUs"):
        page.make_server(config)


@pytest.mark.parametrize("override", ["port=70000", "grid=1", "cached_images=0", "max_upload_mb=0", "colour=red"])
def test_settings_out_of_range_are_refused(override):
    with pytest.raises(ValueError, match=override.partition("=")[0]):
        build(PageConfig, {}, [override])
    assert "max_upload_mb" in describe(PageConfig)


def test_the_command_says_where_the_page_is_and_ends_on_ctrl_c():
    command = [sys.executable, "-m", "kinema.pipelines.cli", "demo", "fpt", "model=fpt_tiny", "grid=8", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        while not lines or "the page is at" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        assert any("UNTRAINED" in line for line in lines)
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", lines[-1])[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/api/example", b"{}")
        image = json.loads(connection.getresponse().read())["image"]
        connection.request("POST", "/api/field", json.dumps({"image": image}))
        assert json.loads(connection.getresponse().read())["queries"] == 64
        with pytest.raises(ValueError, match=f"port={port} cannot be used"):
            page.run(build(PageConfig, {}, [f"port={port}"]))
        connection.request(
            "POST", "/api/samples", json.dumps({"image": image, "side": 32, "samples": 32, "joint": True})
        )
        time.sleep(0.3)  # the model is busy for many seconds now
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert json.loads(connection.getresponse().read())["stale"]
        assert process.returncode == 0 and json.loads(out)["predictions"] == 1
        assert len(err.splitlines()) == 1 and "page closed after" in err and "1 prediction" in err
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
