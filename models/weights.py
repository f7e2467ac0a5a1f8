"""The ledger of published weights, and the one way weights get into a model.

Files are read without running code from them (`weights_only` or safetensors) and loaded strictly: every
key of the model must be in the file and the other way round. Downloads are kept in `$KINEMA_CACHE`
(default ~/.cache/kinema), appear there only when complete, and are checked against the ledger's hash.
"""

import argparse
import hashlib
import http.client
import os
import pickle
import struct
import tempfile
import urllib.parse
import urllib.request
import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class PublishedWeights:
    """One published weights file."""

    url: str
    """Where the file is; for gated weights, the page where access is asked for."""
    paper: str
    """Paper that describes the model."""
    licence: str
    """Licence of the weights."""
    sha256: str | None = None
    """Hash of the weights file (of the member, for an archive), where known."""
    archive_member: str | None = None
    """Path inside the zip archive at `url`, when the file is shipped in one."""
    gated: bool = False
    """Whether the file can only be had after accepting terms by hand."""
    by_hand: bool = False
    """Whether `url` is a page from which people take the file; a program cannot fetch it."""
    non_commercial: bool = False
    """Whether the licence forbids commercial use; said aloud whenever such weights are loaded."""


NONE_STATED = "none stated"
"""How the licence of weights begins whose authors name none."""


class NonCommercialWeightsWarning(UserWarning):
    """The weights that were just loaded may not be used commercially."""


_RAFT_ARCHIVE = "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip"
_FLOWFEAT = "https://cvg.cit.tum.de/webshare/g/papers/flowfeat/"
_META = "https://dl.fbaipublicfiles.com/"

_RAFT_PAPER = "Teed and Deng, RAFT, ECCV 2020, arXiv:2003.12039"
_FLOWFEAT_PAPER = "Araslanov, Sonnweber, Cremers, FlowFeat, NeurIPS 2025"
_DINO_PAPER = "Caron et al., DINO, ICCV 2021, arXiv:2104.14294"
_DINOV2_PAPER = "Oquab et al., DINOv2, TMLR 2024, arXiv:2304.07193"
_REGISTERS_PAPER = "Darcet et al., Vision Transformers Need Registers, ICLR 2024, arXiv:2309.16588"
_DINOV3_PAPER = "Simeoni et al., DINOv3, 2025, arXiv:2508.10104"
_MAE_PAPER = "He et al., MAE, CVPR 2022, arXiv:2111.06377"
_SEA_RAFT_PAPER = "Wang, Lipson, Deng, SEA-RAFT, ECCV 2024, arXiv:2405.14793"
_WAFT_PAPER = "Wang and Deng, WAFT, ICLR 2026, arXiv:2506.21526"
_ALLTRACKER_PAPER = "Harley et al., AllTracker, ICCV 2025, arXiv:2506.07310"
_DISMO_PAPER = "Ressler-Antal et al., DisMo, NeurIPS 2025, arXiv:2511.23428"
_COTRACKER3_PAPER = "Karaev et al., CoTracker3, 2024, arXiv:2410.11831"


def _sea_raft(size: str) -> PublishedWeights:
    # Trained on Spring last, at half resolution; L is M with more refinements.
    url = f"https://huggingface.co/MemorySlices/Tartan-C-T-TSKH-spring540x960-{size}/resolve/main/model.safetensors"
    return PublishedWeights(url, _SEA_RAFT_PAPER, "BSD-3-Clause")


def _alltracker(name: str) -> PublishedWeights:
    url = f"https://huggingface.co/aharley/alltracker/resolve/main/{name}.pth"
    return PublishedWeights(url, _ALLTRACKER_PAPER, "none stated (code MIT)")


def _flowfeat(file: str) -> PublishedWeights:
    return PublishedWeights(_FLOWFEAT + file, _FLOWFEAT_PAPER, "Apache-2.0")


def _dinov2(size: str) -> dict[str, PublishedWeights]:
    stem = f"{_META}dinov2/dinov2_{size}/dinov2_{size}"
    return {
        f"dinov2_{size}": PublishedWeights(f"{stem}_pretrain.pth", _DINOV2_PAPER, "Apache-2.0"),
        f"dinov2_{size}_reg": PublishedWeights(f"{stem}_reg4_pretrain.pth", _REGISTERS_PAPER, "Apache-2.0"),
    }


LEDGER: dict[str, PublishedWeights] = {
    "raft": PublishedWeights(_RAFT_ARCHIVE, _RAFT_PAPER, "BSD-3-Clause", archive_member="models/raft-things.pth"),
    "raft_small": PublishedWeights(
        _RAFT_ARCHIVE,
        _RAFT_PAPER,
        "BSD-3-Clause",
        sha256="c7d41b9cc88442bb8aa911dbb33086dac55a226394b142937ff22d5578717332",
        archive_member="models/raft-small.pth",
    ),
    "sea_raft_s": _sea_raft("S"),
    "sea_raft_m": _sea_raft("M"),
    "sea_raft_l": _sea_raft("M"),
    "waft": PublishedWeights(
        "https://drive.google.com/drive/folders/1qimz12pIEwktiBYwYtPQcCrYykBHw-bX",
        _WAFT_PAPER,
        "none stated (code BSD-3-Clause; the Depth Anything V2 Small inside is Apache-2.0)",
        by_hand=True,
    ),
    "dino_vits16": PublishedWeights(
        f"{_META}dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", _DINO_PAPER, "Apache-2.0"
    ),
    "dino_vitb16": PublishedWeights(
        f"{_META}dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", _DINO_PAPER, "Apache-2.0"
    ),
    **_dinov2("vits14"),
    **_dinov2("vitb14"),
    **_dinov2("vitl14"),
    "dinov3_vits16": PublishedWeights(
        "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/",
        _DINOV3_PAPER,
        "DINOv3 License",
        gated=True,
    ),
    "mae_vitb16": PublishedWeights(
        f"{_META}mae/pretrain/mae_pretrain_vit_base.pth", _MAE_PAPER, "CC BY-NC 4.0", non_commercial=True
    ),
    "dinoflow_vits16": PublishedWeights(
        "https://huggingface.co/blanchon/dinoflow-model/resolve/main/flow-vits16.safetensors",
        "Model card of blanchon/dinoflow-model; AnyDepth, 2026, arXiv:2601.02760",
        "see the model card; the encoder it needs is under the DINOv3 License",
    ),
    "cotracker3_offline": PublishedWeights(
        "https://huggingface.co/facebook/cotracker3/resolve/main/scaled_offline.pth",
        _COTRACKER3_PAPER,
        "CC BY-NC 4.0",
        non_commercial=True,
    ),
    "alltracker": _alltracker("alltracker"),
    "alltracker_tiny": _alltracker("alltracker_tiny"),
    "flowfeat/dino_vits16_yt": _flowfeat("dino_s16_flowfeat_yt.pth"),
    "flowfeat/dino_vitb16_yt": _flowfeat("dino_b16_flowfeat_yt.pth"),
    "flowfeat/dino_vitb16_kt": _flowfeat("dino_b16_flowfeat_kt.pth"),
    "flowfeat/mae_vitb16_kt": PublishedWeights(
        _FLOWFEAT + "mae_b16_flowfeat_kt.pth",
        _FLOWFEAT_PAPER,
        "Apache-2.0; the encoder inside is MAE's, CC BY-NC 4.0",
        non_commercial=True,
    ),
    "flowfeat/dinov2_vits14_yt": _flowfeat("dino2_s14_flowfeat_yt.pth"),
    "flowfeat/dinov2_vitb14_yt": _flowfeat("dino2_b14_flowfeat_yt.pth"),
    "flowfeat/dinov2_vitb14_kt": _flowfeat("dino2_b14_flowfeat_kt.pth"),
    "motion_extractor_large": PublishedWeights(
        "https://huggingface.co/CompVis/DisMo/resolve/main/motion_extractor_large.pt",
        _DISMO_PAPER,
        "CC BY-NC 4.0",
        non_commercial=True,
    ),
    "cogvideox5b_i2v_large": PublishedWeights(
        "https://huggingface.co/CompVis/DisMo/resolve/main/cogvideox5b_i2v_large.pt",
        _DISMO_PAPER,
        "CC BY-NC 4.0 (adapter); the CogVideoX-5B-I2V it goes around is under the CogVideoX License",
        non_commercial=True,
    ),
    "fpt_base": PublishedWeights(
        "https://huggingface.co/CompVis/flow-poke-transformer/resolve/main/flow_poke_open_set_base.pt",
        "Baumann et al., What If: Understanding Motion Through Sparse Interactions, ICCV 2025, arXiv:2510.12777",
        "CC BY-NC 4.0",
        non_commercial=True,
    ),
}

# Where training scripts keep the state dict inside a checkpoint, in the order they are looked for.
LISTED_KEYS = 12
"""Missing, unexpected and misshapen keys that a message lists of each, at the most."""
_NESTINGS = ("model", "state_dict", "model_state_dict", "teacher")

_UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    OverflowError,
    MemoryError,
    OSError,
    struct.error,
)


def resolve_weights(model: Model, name: str, pretrained: bool, weights: str | Path | None) -> Model:
    """Give `model` the weights a hub call asked for: `weights` if given, else the published ones, else none.

    Args: name is the model's name in the ledger.
    Raises: ValueError as `load_weights` does.
    """
    if weights is not None:
        return load_weights(model, weights, name)
    if pretrained:
        return load_weights(model, published_file(name), name)
    return model


def load_weights(model: Model, source: str | Path | None, name: str) -> Model:
    """Load a checkpoint into `model`, strictly, and return the model.

    Args:
        source: path or http(s) URL of a .pth or .safetensors file; None leaves the model as it is.
        name: what the model is called, in the ledger and in messages.
    Raises: ValueError, one line, if the file is missing, is no checkpoint, is incomplete, or has missing,
        unexpected or wrongly shaped keys, which are listed. The model is then unchanged.
    """
    if source is None:
        return model
    source = str(source)
    path = download(source) if "://" in source else Path(source).expanduser()
    state = read_state_dict(path)
    for prefix, module in model.named_modules():
        if hasattr(module, "adapt_state_dict"):
            module.adapt_state_dict(state, f"{prefix}." if prefix else "")
    check_keys(model.state_dict(), state, source, name)
    model.load_state_dict(state, strict=True)
    if name in LEDGER and LEDGER[name].non_commercial:
        warnings.warn(licence_notice(name), NonCommercialWeightsWarning, stacklevel=2)
    return model


def licence_notice(name: str) -> str:
    """What a user of these published weights must know of their licence; empty if they may be used commercially."""
    entry = LEDGER.get(name)
    if entry is None:
        return ""
    if entry.licence.startswith(NONE_STATED):
        return f"weights of {name}: licence {entry.licence}; ask their authors before you use them commercially"
    return f"weights of {name}: licence {entry.licence}; not for commercial use" if entry.non_commercial else ""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by key, without nesting and without a leading `module.`.

    Raises: ValueError if the file is missing, is not a checkpoint, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"weights={path}: the file {what}; give a .pth or .safetensors file")
    if path.suffix == ".safetensors":
        state = _read_safetensors(path)
    else:
        state = _unwrap(_read_torch(path))
    if not state:
        raise ValueError(f"weights={path}: no tensors in the file; give a model's state dict")
    while all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def published_file(name: str) -> Path:
    """Local copy of the published weights of `name`, downloaded if needed.

    Raises: ValueError if there are none, if they are gated, or if the download fails or has another hash.
    """
    if name not in LEDGER:
        raise ValueError(f"no published weights are known for {name!r}; give weights=FILE")
    entry = LEDGER[name]
    if entry.gated:
        raise ValueError(
            f"the weights of {name} are gated ({entry.licence}): ask for them at {entry.url} and give weights=FILE"
        )
    if entry.by_hand:
        raise ValueError(
            f"the weights of {name} cannot be fetched by a program: take them from {entry.url}, weights=FILE"
        )
    return download(entry.url, sha256=entry.sha256, archive_member=entry.archive_member)


def local_file(weights: str, name: str) -> Path:
    """The file behind a setting `weights=`: a path, an http(s) URL, or empty for the published weights of `name`.

    Raises: ValueError if there is no such file.
    """
    if not weights:
        return published_file(name)
    path = download(weights) if "://" in weights else Path(weights).expanduser().absolute()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"weights={weights}: the file {what}; give a .pth or .safetensors file of {name}")
    return path


def cache_folder() -> Path:
    """Where downloads are kept: `$KINEMA_CACHE`, or ~/.cache/kinema."""
    return Path(os.environ.get("KINEMA_CACHE") or Path.home() / ".cache" / "kinema")


def cached_path(url: str, archive_member: str | None = None) -> Path:
    """Where `download` keeps a file, whether it is there or not."""
    base = Path(archive_member or urllib.parse.urlsplit(url).path).name
    # Files of one name from two places must not be taken for one another.
    tag = hashlib.sha256(f"{url}#{archive_member or ''}".encode()).hexdigest()[:8]
    return cache_folder() / "weights" / tag / base


def download(url: str, sha256: str | None = None, archive_member: str | None = None) -> Path:
    """Fetch a file into the cache unless it is there, and return its path.

    Args: archive_member, if given, names the file to take out of the zip archive at `url`.
    Raises: ValueError if the address cannot be read or the content has another hash than `sha256`.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https", "file"):
        raise ValueError(f"weights={url}: only http, https and file addresses can be read; download it first")
    target = cached_path(url, archive_member)
    base = target.name
    if target.is_file():
        if sha256 is None or file_sha256(target) == sha256:
            return target
        raise ValueError(f"{target}: its hash is not {sha256}; delete the file to download it again")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to the cache {cache_folder()} ({error}); set KINEMA_CACHE") from error
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        part = Path(folder) / base
        _fetch(url, part)
        if archive_member:
            part = _extract(part, archive_member, Path(folder), url)
        found = file_sha256(part)
        if sha256 is not None and found != sha256:
            raise ValueError(f"{url}: downloaded file has sha256 {found}, expected {sha256}; it was not kept")
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(part, target)
    return target


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fetch(url: str, target: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as response, target.open("wb") as out:
            expected = response.headers.get("Content-Length")
            while block := response.read(1 << 20):
                out.write(block)
            received = out.tell()
    except (OSError, http.client.HTTPException) as error:  # no network, no such file, no room on the disk
        reason = getattr(error, "reason", error)
        raise ValueError(f"cannot download {url} ({reason}); download it elsewhere and give weights=FILE") from error
    if expected is not None and received != int(expected):
        raise ValueError(f"{url}: the download ended after {received} of {expected} bytes; try again")


def _extract(archive: Path, member: str, folder: Path, url: str) -> Path:
    out = folder / f"member-{Path(member).name}"
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(member) as stream, out.open("wb") as target:
            while block := stream.read(1 << 20):
                target.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{url}: is not a zip archive that holds {member}; give weights=FILE") from error
    return out


def _read_torch(path: Path) -> object:
    try:
        # Training scripts like to keep their parsed arguments beside the tensors; they are inert.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds something other than tensors, or is no checkpoint at all"
        raise ValueError(
            f"weights={path}: not a readable checkpoint, or cut short ({reason}); "
            "give a complete .pth or .safetensors file of tensors"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weights={path}: not a readable safetensors file, or cut short ({error})") from error


def _unwrap(loaded: object) -> dict[str, Tensor]:
    """The state dict inside what a checkpoint file holds; empty if there is none."""
    if not isinstance(loaded, dict):
        return {}
    for nesting in _NESTINGS:
        inner = loaded.get(nesting)
        if isinstance(inner, dict):
            if nesting == "teacher":  # DINO's training checkpoints: backbone and projection head
                plain = {str(key).removeprefix("module."): value for key, value in inner.items()}
                inner = {k.removeprefix("backbone."): v for k, v in plain.items() if k.startswith("backbone.")}
            return _unwrap(inner)
    return {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, Tensor)}


def check_keys(
    wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str, name: str, also: Collection[str] = ()
) -> None:
    """Whether a checkpoint fits. Args: wanted, the tensors that must be in it; also, keys that may be.

    Raises: ValueError listing missing, unexpected and wrongly shaped keys.
    """
    shapes = {
        key: f"{key} {list(state[key].shape)} instead of {list(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    }
    faults = {
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in wanted and key not in also],
        "wrong shape": list(shapes.values()),
    }
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {_listed(keys)}" for kind, keys in faults.items() if keys)
        raise ValueError(f"weights={source} do not fit {name} ({listed})")


def _listed(keys: list[str]) -> str:
    shown = keys if len(keys) <= LISTED_KEYS else keys[: LISTED_KEYS - 1]
    more = len(keys) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
