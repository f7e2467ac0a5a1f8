"""`kinema flow`, `kinema features` and `kinema models`: single pictures and films, without artifacts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float32, UInt8
from PIL import Image, UnidentifiedImageError

from kinema.configs.load import build
from kinema.configs.models.row import ModelRow
from kinema.configs.models.table import MODELS
from kinema.models.weights import LEDGER, PublishedWeights, cached_path
from kinema.pipelines.model_address import load_address
from kinema.pipelines.pictures.images import feature_pca, flow_picture, normalise_images, size_for_model, write_png
from kinema.pipelines.pictures.motion import write_mp4
from kinema.pipelines.progress import Progress
from kinema.pipelines.sidecars.flow_files import write_flow
from kinema.pipelines.summary import print_summary
from kinema.pipelines.video.decode import VideoFile
from kinema.pipelines.video.packets import to_rgb

FILMS = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v")
FLOW_FILES = (".flo", ".pfm", ".flo5")


@dataclass(frozen=True)
class FlowRequest:
    """`kinema flow A B` or `kinema flow FILM`."""

    teacher: str = field(default="dis", metadata={"choices": lambda: MODELS.of_kind("flow")})
    """Flow network by name, or a run folder, checkpoint or models:/NAME@ALIAS."""
    weights: str = ""
    """Weights for a name: file or URL; empty or `published`: the published ones (dis needs none)."""
    out: str = ""
    """flow.flo, .pfm or .flo5 (numbers), .png (colours; with _kitti.png numbers) or, of a film, film.mp4; empty:
    beside the first input."""
    iters: int = 0
    """Refinements; 0: the network's usual number."""


@dataclass(frozen=True)
class FeaturesRequest:
    """`kinema features IMAGE`."""

    model: str = "models:/kinema-flowfeat@champion"
    """Run folder, checkpoint, models:/NAME@ALIAS or a FlowFeat variant such as dinov2_vits14_yt."""
    weights: str = ""
    """Weights for a variant's name: file or URL; empty or `published`: the published ones."""
    out: str = ""
    """features.png (main components as colours) or .npy (float32 [C, H, W]); empty: a picture beside the input."""
    features: str = field(default="y_dec", metadata={"choices": lambda: ("y_dec", "y_enc")})
    """Features of every pixel, or of the encoder's patches."""
    short_side: int = 448
    """Shorter side at which the model sees the picture."""


@dataclass(frozen=True)
class SingleSummary:
    """What was written."""

    out: str
    """The file."""
    height: int
    """Of the flow or features, in pixels."""
    width: int
    frames: int = 1
    """Pairs of frames, for a film."""
    largest_px: float = 0.0
    """Longest motion."""
    exit_status: int = 0
    """Always 0."""


def predict_flow(
    image1: UInt8[np.ndarray, "H W 3"], image2: UInt8[np.ndarray, "H W 3"], network: Any, iters: int = 0
) -> Float32[np.ndarray, "2 H W"]:
    """Flow from image1 to image2, (x, y) in pixels.

    Args: network, of `load_model`; iters, refinements, 0 for its usual number.
    Raises: ValueError for pictures of different sizes.
    """
    if image1.shape != image2.shape:
        raise ValueError(f"the pictures are {image1.shape[:2]} and {image2.shape[:2]}; give two of one size")
    first, second = (
        torch.from_numpy(np.ascontiguousarray(i)).permute(2, 0, 1)[None].float() / 255 for i in (image1, image2)
    )
    with torch.inference_mode():
        return network(first, second, iters=iters or None)[0].float().numpy()


def predict_features(
    image: UInt8[np.ndarray, "H W 3"], network: Any, short_side: int = 448
) -> tuple[Float32[np.ndarray, "C h w"], Float32[np.ndarray, "D H2 W2"]]:
    """(y_enc, y_dec) of a picture, which the model sees at about this shorter side.

    Args: network, a FlowFeat of `load_model`.
    """
    size = size_for_model(image.shape[:2], short_side, network.encoder)
    x = torch.nn.functional.interpolate(_batch(image), size, mode="bilinear", antialias=True)
    with torch.inference_mode():
        y_enc, y_dec = network(normalise_images(x))
    return y_enc[0].float().numpy(), y_dec[0].float().numpy()


def _batch(image: UInt8[np.ndarray, "H W 3"]) -> torch.Tensor:
    """[1, 3, H, W] in 0..1."""
    return rearrange(torch.from_numpy(np.ascontiguousarray(image)), "h w c -> 1 c h w").float() / 255


def flow_command(arguments: Sequence[str]) -> SingleSummary:
    """`kinema flow a.png b.png` or `kinema flow film.mp4`."""
    files, request = _split(arguments, FlowRequest)
    is_film = len(files) == 1 and Path(files[0]).suffix.lower() in FILMS
    if len(files) != 2 and not is_film:
        raise ValueError(f"{len(files)} files given; give two pictures, or one film ({', '.join(FILMS)})")
    out = Path(request.out or Path(files[0]).with_name(f"{Path(files[0]).stem}_flow{'.mp4' if is_film else '.png'}"))
    fitting = (".mp4",) if is_film else (*FLOW_FILES, ".png")
    if out.suffix not in fitting:
        raise ValueError(f"out={out}: a {'film' if is_film else 'pair'} becomes one of {', '.join(fitting)}")
    network = load_address(request.teacher, request.weights, kind="flow", user="kinema flow").network
    if is_film:
        return _flow_film(files[0], out, network, request.iters)
    flow = predict_flow(read_image(files[0]), read_image(files[1]), network, request.iters)
    if out.suffix in FLOW_FILES or out.name.endswith("_kitti.png"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_flow(out, flow)
    else:
        write_png(out, flow_picture(torch.from_numpy(flow)))
    _, height, width = flow.shape
    return SingleSummary(str(out), height, width, largest_px=round(float(np.hypot(*flow).max()), 2))


def features_command(arguments: Sequence[str]) -> SingleSummary:
    """`kinema features image.png`."""
    files, request = _split(arguments, FeaturesRequest)
    if len(files) != 1:
        raise ValueError(f"{len(files)} files given; give one picture")
    out = Path(request.out or Path(files[0]).with_name(f"{Path(files[0]).stem}_features.png"))
    if out.suffix not in (".png", ".npy"):
        raise ValueError(f"out={out}: features become a .png (colours) or .npy (numbers)")
    network = load_address(request.model, request.weights, kind="features", user="kinema features").network
    maps = predict_features(read_image(files[0]), network, request.short_side)[request.features == "y_dec"]
    if out.suffix == ".npy":
        out.parent.mkdir(parents=True, exist_ok=True)
        np.save(out, maps, allow_pickle=False)
    else:
        write_png(out, feature_pca(torch.from_numpy(maps)))
    _, height, width = maps.shape
    return SingleSummary(str(out), height, width)


def read_image(path: str | Path) -> UInt8[np.ndarray, "H W 3"]:
    """A picture file as RGB. Raises: ValueError if it is none."""
    try:
        return np.array(Image.open(path).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else "is no picture that can be read"
        raise ValueError(f"{path} {reason}; give a PNG or JPEG") from None


def models_table() -> list[dict[str, Any]]:
    """A row for every model: name, kind, parameters in millions, licence of its weights, whether they are at hand."""
    return [_model_row(name, row) for name, row in MODELS.items()]


def write_models(as_json: bool, stdout: TextIO) -> int:
    """Print the table of models."""
    rows = models_table()
    if as_json:
        print_summary({"models": rows}, True, stdout)
        return 0
    columns = ("model", "gives", "parameters", "licence", "weights", "published")
    shown = [{**row, "published": "; ".join(f"{k} {v}" for k, v in row["published"].items())} for row in rows]
    widths = {name: max(len(name), *(len(str(row[name])) for row in shown)) for name in columns}
    for row in ({name: name for name in columns}, *shown):
        stdout.write("  ".join(f"{row[name]!s:<{widths[name]}}" for name in columns).rstrip() + "\n")
    return 0


def _model_row(name: str, row: ModelRow) -> dict[str, Any]:
    entry = LEDGER.get(row.weights)
    return {
        "model": name,
        "gives": row.kind,
        "parameters": f"{row.parameters / 1e6:.1f} M" if row.parameters else "",
        "licence": entry.licence if entry else "",
        "weights": _at_hand(entry) if entry else _without_entry(row),
        "published": dict(row.published),
        "summary": row.summary,
    }


def _at_hand(entry: PublishedWeights) -> str:
    if cached_path(entry.url, entry.archive_member).is_file():
        return "here"
    if entry.by_hand:
        return "by hand"
    return "on request" if entry.gated else "to download"


def _without_entry(row: ModelRow) -> str:
    """Of a model without published weights that a program knows of."""
    facts = row.teacher or row.tracker
    needs = facts.needs_weights if facts else bool(row.network)
    return "your own" if needs else "none needed"


def _flow_film(path: str, out: Path, network: Any, iters: int) -> SingleSummary:
    """Frame and flow side by side."""
    largest, count, size = 0.0, 0, (0, 0)

    def sides() -> Iterator[np.ndarray]:
        nonlocal largest, count, size
        progress = Progress("flow", 0, "pairs")
        for first, second in itertools.pairwise(frames):
            flow = predict_flow(first, second, network, iters)
            largest, count, size = max(largest, float(np.hypot(*flow).max())), count + 1, first.shape[:2]
            progress.total = count + 1
            progress.update(count)
            yield np.concatenate([first, flow_picture(torch.from_numpy(flow))], axis=1)
        progress.close()

    with VideoFile(path) as video:
        fps = float(video.rates[0]) if video.rates else 25.0
        frames = (to_rgb(frame) for frame in video.frames())
        write_mp4(out, sides(), fps)
    height, width = size
    return SingleSummary(str(out), height, width, frames=count, largest_px=round(largest, 2))


def _split(arguments: Sequence[str], schema: Any) -> tuple[list[str], Any]:
    """Files, and the settings among the arguments: `key=value` with a known key."""
    names = {f.name for f in dataclasses.fields(schema)}
    settings = [text for text in arguments if text.partition("=")[0] in names and "=" in text]
    files = [text for text in arguments if text not in settings]
    unknown = [text for text in files if "=" in text and not Path(text).exists()]
    return [text for text in files if text not in unknown], build(schema, {}, [*settings, *unknown])
