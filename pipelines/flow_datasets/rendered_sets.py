"""Layouts of rendered data sets: FlyingChairs, FlyingThings3D, Sintel, Spring, TartanAir, VIPER.

Sources: Dosovitskiy et al. (FlyingChairs) ICCV 2015; Mayer et al. (FlyingThings3D) CVPR 2016; Butler et al. (Sintel)
ECCV 2012; Mehl et al. (Spring) CVPR 2023; Wang et al. (TartanAir) IROS 2020; Richter et al. (VIPER) ICCV 2017.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from einops import rearrange

from kinema.pipelines.flow_datasets.listing import Folder, Listing, Selection, unique
from kinema.pipelines.flow_datasets.sample import (
    BadFlow,
    FlowFiles,
    SizesDiffer,
    Truth,
    read_flow_file,
    read_labels,
    read_mask,
)

CHAIRS_PAIRS = {"training": 22232, "validation": 640}
SINTEL_FRAMES = dict.fromkeys(
    "alley_1 alley_2 ambush_5 ambush_7 bamboo_1 bamboo_2 bandage_1 bandage_2 cave_2 cave_4 market_2 market_5 "
    "mountain_1 shaman_2 shaman_3 sleeping_1 sleeping_2 temple_2 temple_3".split(),
    50,
) | {"ambush_2": 21, "ambush_4": 33, "ambush_6": 20, "market_6": 40}
SINTEL_TEST_PAIRS = 552
THINGS_SEQUENCES = {"training": 2239, "test": 437}
THINGS_FRAMES = range(6, 16)
SPRING_TEST_FRAMES = dict(
    [("0003", 131), ("0019", 111), ("0028", 39), ("0029", 135), ("0031", 73)]
    + [("0034", 47), ("0035", 120), ("0040", 111), ("0042", 116), ("0046", 117)]
)
SPRING_TRAIN_FRAMES, SPRING_TRAIN_SCENES = 5000, 37
VIPER_LIMIT_PX = 512.0
TARTANAIR_UNKNOWN = 100
_GAPS = {"forward": 1, "backward": -1}


def chairs(folder: Folder, want: Selection) -> Listing:
    """`data/00001_img1.ppm`, `_img2.ppm`, `_flow.flo`; FlyingChairs_train_val.txt: 1 for training, 2 for validation.

    The split file lies beside or in `data`, one line per pair; chairs_split.txt, its name in other programs, serves.
    """
    flat = "00001_img1.ppm" in folder.names()
    data = "" if flat else next((p for p in ("data", "FlyingChairs_release/data") if folder.names(p)), "data")
    places = (folder.root, folder.root / data, (folder.root / data).parent)
    names = ("FlyingChairs_train_val.txt", "chairs_split.txt")
    split_file = next((p / n for p in places for n in names if folder.has(p / n)), places[0] / names[0])
    wanted = {"training": "1", "validation": "2"}.get(want.split)
    layout = "data/00001_img1.ppm, _img2.ppm, _flow.flo and FlyingChairs_train_val.txt"
    if wanted is None:
        return Listing([], 0, layout)
    numbers = {int(name[:5]) for name in folder.names(data) if re.fullmatch(r"\d{5}_(img[12]\.ppm|flow\.flo)", name)}
    marks: list[str] = split_file.read_text().split() if folder.has(split_file) else []
    members = [n for n, mark in enumerate(marks, 1) if mark == wanted]
    # Numbers behind the list belong to the training part; without a list nothing can be told apart.
    members += [n for n in sorted(numbers) if n > len(marks) and (marks and want.split == "training")]
    pairs = [_chair(folder.root / data, number) for number in members]
    if not marks:  # as a file of every pair, so that it is named as missing and none is taken for whole
        pairs = [replace(_chair(folder.root / data, n), masks={"split": split_file}) for n in sorted(numbers) or [1]]
    return Listing(pairs, CHAIRS_PAIRS[want.split], layout)


def _chair(data: Path, number: int) -> FlowFiles:
    stem = f"{number:05d}"
    image1, image2 = (data / f"{stem}_img{k}.ppm" for k in (1, 2))
    return FlowFiles(stem, stem, 1, 1, image1, image2, data / f"{stem}_flow.flo", group="chairs")


def things(folder: Folder, want: Selection) -> Listing:
    """`frames_cleanpass/TRAIN/A/0000/left/0006.png`, `optical_flow/TRAIN/A/0000/into_future/left/...0006_L.pfm`.

    Flow leads out of the ten frames at their end (6 to 15), so each sequence gives nine pairs a direction.
    """
    part = {"training": "TRAIN", "test": "TEST"}.get(want.split, "TRAIN")
    sequences = sorted(
        {
            (letter, number)
            for top in ("optical_flow", *(f"frames_{p}pass" for p in want.passes))
            for letter in folder.names(top, part)
            for number in folder.names(top, part, letter)
        }
    )
    pairs = [
        _thing(folder.root, part, sequence, rendering, camera, direction, frame)
        for sequence in sequences
        for rendering in want.passes
        for camera in want.cameras
        for direction in want.directions
        for frame in THINGS_FRAMES
        if frame + _GAPS[direction] in THINGS_FRAMES
    ]
    count = THINGS_SEQUENCES[want.split] * 9 if want.split in THINGS_SEQUENCES else 0
    expected = count * len(want.passes) * len(want.cameras) * len(want.directions)
    layout = "frames_cleanpass/TRAIN/A/0000/left/0006.png and optical_flow/TRAIN/A/0000/into_future/left/*.pfm"
    return Listing(unique(pairs) if count else [], expected, layout)


def _thing(
    root: Path, part: str, sequence: tuple[str, str], rendering: str, camera: str, direction: str, frame: int
) -> FlowFiles:
    letter, number = sequence
    into = {"forward": "future", "backward": "past"}[direction]
    images = root / f"frames_{rendering}pass" / part / letter / number / camera
    name = f"OpticalFlowInto{into.title()}_{frame:04d}_{camera[0].upper()}.pfm"
    return FlowFiles(
        id=f"{rendering}/{letter}/{number}/{camera}/{frame:04d}{'' if direction == 'forward' else '_backward'}",
        scene=f"{rendering}/{letter}/{number}/{camera}",
        frame=frame,
        gap=_GAPS[direction],
        image1=images / f"{frame:04d}.png",
        image2=images / f"{frame + _GAPS[direction]:04d}.png",
        flow=root / "optical_flow" / part / letter / number / f"into_{into}" / camera / name,
        group=rendering,
    )


def sintel(folder: Folder, want: Selection) -> Listing:
    """`training/clean/SCENE/frame_0001.png`, `flow/SCENE/frame_0001.flo`, `occlusions/`, `invalid/`; `test/clean/`.

    masks: `invalid`, pixels that the publishers do not trust; published figures count them all the same.
    """
    part = "test" if want.split == "test" else "training"
    inside = bool(folder.names(part)) or not any(folder.names(name) for name in ("flow", *want.passes))
    base = folder.root / part if inside else folder.root
    layout = "training/clean/SCENE/frame_0001.png, training/flow/SCENE/frame_0001.flo (test/ without flow)"
    if part == "test":
        return Listing(unique(_sintel_test(folder, base, want)), SINTEL_TEST_PAIRS * len(want.passes), layout)
    found = {
        (scene, int(name[6:10]))
        for scene in folder.names(str(base), "flow")
        for name in folder.names(str(base), "flow", scene)
        if re.fullmatch(r"frame_\d{4}\.flo", name)
    }
    published = {(scene, n) for scene, frames in SINTEL_FRAMES.items() for n in range(1, frames)}
    kinds = [kind for kind in ("occlusions", "invalid") if folder.names(str(base), kind)]
    pairs = [
        _sintel(base, rendering, *place, kinds) for rendering in want.passes for place in sorted(published | found)
    ]
    if want.trusted_only:
        pairs = [replace(pair, read_truth=_trusted_sintel_truth) for pair in pairs]
    return Listing(unique(pairs), len(published) * len(want.passes), layout)


def _sintel(base: Path, rendering: str, scene: str, number: int, kinds: list[str]) -> FlowFiles:
    stem = f"frame_{number:04d}"
    return FlowFiles(
        id=f"{rendering}/{scene}/{stem}",
        scene=f"{rendering}/{scene}",
        frame=number,
        gap=1,
        image1=base / rendering / scene / f"{stem}.png",
        image2=base / rendering / scene / f"frame_{number + 1:04d}.png",
        flow=base / "flow" / scene / f"{stem}.flo",
        masks={kind: base / kind / scene / f"{stem}.png" for kind in kinds},
        group=rendering,
        read_truth=_sintel_truth,
    )


def _sintel_test(folder: Folder, base: Path, want: Selection) -> Iterator[FlowFiles]:
    for rendering in want.passes:
        for scene in folder.names(str(base), rendering):
            for name in folder.names(str(base), rendering, scene)[:-1]:
                pair = _sintel(base, rendering, scene, int(name[6:10]), [])
                yield replace(pair, flow=None, read_truth=None)


def _sintel_truth(files: FlowFiles) -> Truth:
    assert files.flow is not None
    masks = {name: read_mask(path) for name, path in files.masks.items()}
    return Truth(read_flow_file(files.flow), masks.pop("occlusions", None), masks)


def _trusted_sintel_truth(files: FlowFiles) -> Truth:
    truth = _sintel_truth(files)
    if "invalid" not in truth.masks:
        raise BadFlow(f"{files.id}: there is no `invalid` mask to tell what is trusted; copy the folder `invalid`")
    flow_px = np.where(truth.masks["invalid"], np.float32(np.nan), truth.flow_px)
    return replace(truth, flow_px=flow_px)


def spring(folder: Folder, want: Selection) -> Listing:
    """`train/0001/frame_left/frame_left_0001.png`, `flow_FW_left/flow_FW_left_0001.flo5`, `maps/`; `test/` has no flow.

    Flow is stored at twice the images' height and width, in pixels of the images: four true values for each pixel.
    `flow_px` is the first of them, as the publishers' loader takes; `candidates_px` holds all four, row by row, of
    which the benchmark counts the nearest. masks: `detail`, `nonrigid`, `sky` as the benchmark's; unmatched pixels
    are `occlusion`.
    """
    part = "test" if want.split == "test" else "train"
    base = folder.root / part
    layout = "train/0001/frame_left/frame_left_0001.png and train/0001/flow_FW_left/flow_FW_left_0001.flo5"
    ways = len(want.cameras) * len(want.directions)
    if want.split == "validation":
        return Listing([], 0, layout)
    pairs = []
    for scene in folder.names(part):
        for camera in want.cameras:
            frames = _numbers(folder.names(part, scene, f"frame_{camera}"), rf"frame_{camera}_(\d{{4}})\.png")
            for direction in want.directions:
                way = {"forward": "FW", "backward": "BW"}[direction]
                flows = _numbers(folder.names(part, scene, f"flow_{way}_{camera}"), r"flow_.*_(\d{4})\.flo5")
                last = (
                    max([*frames, *flows, 1]) if direction == "backward" else max([*frames, *(n + 1 for n in flows), 1])
                )
                starts = range(1, last) if direction == "forward" else range(2, last + 1)
                pairs += [_spring(folder, base, scene, camera, direction, n, part == "test") for n in starts]
    total = sum(SPRING_TEST_FRAMES.values()) - len(SPRING_TEST_FRAMES)
    if part == "train":
        total = SPRING_TRAIN_FRAMES - SPRING_TRAIN_SCENES
    return Listing(unique(pairs), total * ways, layout)


def _spring(
    folder: Folder, base: Path, scene: str, camera: str, direction: str, frame: int, withheld: bool
) -> FlowFiles:
    way = {"forward": "FW", "backward": "BW"}[direction]
    images = base / scene / f"frame_{camera}"
    maps = {
        "unmatched": f"matchmap_flow_{way}_{camera}",
        "detail": f"detailmap_flow_{way}_{camera}",
        "nonrigid": f"rigidmap_{way}_{camera}",
        "sky": f"skymap_{camera}",
    }
    there = {} if withheld else {m: f for m, f in maps.items() if folder.names(str(base), scene, "maps", f)}
    return FlowFiles(
        id=f"{scene}/{camera}/{way}_{frame:04d}",
        scene=f"{scene}/{camera}",
        frame=frame,
        gap=_GAPS[direction],
        image1=images / f"frame_{camera}_{frame:04d}.png",
        image2=images / f"frame_{camera}_{frame + _GAPS[direction]:04d}.png",
        flow=None if withheld else base / scene / f"flow_{way}_{camera}" / f"flow_{way}_{camera}_{frame:04d}.flo5",
        masks={name: base / scene / "maps" / name_ / f"{name_}_{frame:04d}.png" for name, name_ in there.items()},
        group="spring",
        read_truth=None if withheld else _spring_truth,
    )


def _spring_truth(files: FlowFiles) -> Truth:
    assert files.flow is not None
    fine = read_flow_file(files.flow)
    if fine.shape[1] % 2 or fine.shape[2] % 2:
        raise SizesDiffer(
            f"{files.flow}: flow is {fine.shape[1]}x{fine.shape[2]}; Spring's has twice the image's sides"
        )
    candidates = rearrange(fine, "c (h i) (w j) -> (i j) c h w", i=2, j=2)
    masks: dict[str, np.ndarray] = {}
    for name, path in files.masks.items():
        labels = read_labels(path) > 0
        mask = np.asarray(labels[..., :2].any(axis=-1) if labels.ndim == 3 else labels)
        if mask.shape == fine.shape[1:]:  # rigid and sky maps are as fine as the flow: half of a pixel or more
            mask = rearrange(mask, "(h i) (w j) -> h w (i j)", i=2, j=2).mean(axis=-1) >= 0.5
        masks[name] = mask
    return Truth(np.ascontiguousarray(candidates[0]), masks.pop("unmatched", None), masks, candidates)


def tartanair(folder: Folder, want: Selection) -> Listing:
    """`ENVIRONMENT/Easy/P000/image_left/000000_left.png`, `flow/000000_000001_flow.npy` and `_mask.npy`.

    Environments may be nested as their archives unpack (`ENV/ENV/Easy`). A mask value of 100 means that there is no
    flow, another one above 0 that the pixel is occluded.
    """
    pairs = []
    for place in sorted(folder.root.glob("**/image_left")):
        trajectory = place.parent
        frames = _numbers(folder.names(str(place)), r"(\d{6})_left\.png")
        flows = _numbers(folder.names(str(trajectory), "flow"), r"(\d{6})_\d{6}_(?:flow|mask)\.npy")
        last = max([*frames, *(n + 1 for n in flows), 0])
        pairs += [_tartanair(folder.root, trajectory, n) for n in range(last)]
    layout = "ENVIRONMENT/Easy/P000/image_left/000000_left.png and flow/000000_000001_flow.npy, _mask.npy"
    return Listing(unique(pairs) if want.split == "training" else [], None, layout)


def _tartanair(root: Path, trajectory: Path, frame: int) -> FlowFiles:
    scene = trajectory.relative_to(root).as_posix()
    stem = f"{frame:06d}_{frame + 1:06d}"
    return FlowFiles(
        id=f"{scene}/{frame:06d}",
        scene=scene,
        frame=frame,
        gap=1,
        image1=trajectory / "image_left" / f"{frame:06d}_left.png",
        image2=trajectory / "image_left" / f"{frame + 1:06d}_left.png",
        flow=trajectory / "flow" / f"{stem}_flow.npy",
        masks={"mask": trajectory / "flow" / f"{stem}_mask.npy"},
        group="tartanair",
        read_truth=_tartanair_truth,
    )


def _tartanair_truth(files: FlowFiles) -> Truth:
    assert files.flow is not None
    flow, mask = _array(files.flow), _array(files.masks["mask"])
    if flow.ndim != 3 or flow.shape[2] != 2 or mask.ndim != 2:
        raise BadFlow(
            f"{files.flow}: flow is {list(flow.shape)}, its mask {list(mask.shape)}; they are [H, W, 2], [H, W]"
        )
    if flow.shape[:2] != mask.shape:
        raise SizesDiffer(f"{files.flow}: flow is {list(flow.shape[:2])}, its mask {list(mask.shape)}")
    known = (mask != TARTANAIR_UNKNOWN)[..., None]
    _refuse_unknown(files.flow, flow, known)
    flow = np.where(known, flow, np.nan).astype(np.float32)
    return Truth(np.ascontiguousarray(np.moveaxis(flow, -1, 0)), mask > 0)


def viper(folder: Folder, want: Selection) -> Listing:
    """`train/img/001/001_00010.jpg` (or .png) and `train/flow/001/001_00010.npz` (u, v), flow to the next frame.

    Flow is stored in 16-bit floats; nan and components beyond 512 px mean unknown.
    """
    part = {"training": "train", "validation": "val"}.get(want.split, "test")
    layout = "train/img/001/001_00010.jpg and train/flow/001/001_00010.npz"
    pairs = []
    for scene in folder.names(part, "flow"):
        images = folder.names(part, "img", scene)
        suffix = ".png" if images and images[0].endswith(".png") else ".jpg"
        for frame in sorted(_numbers(folder.names(part, "flow", scene), rf"{scene}_(\d{{5}})\.npz")):
            stem = folder.root / part / "img" / scene
            image1, image2 = (stem / f"{scene}_{n:05d}{suffix}" for n in (frame, frame + 1))
            flow = folder.root / part / "flow" / scene / f"{scene}_{frame:05d}.npz"
            name = f"{scene}/{frame:05d}"
            pairs.append(FlowFiles(name, scene, frame, 1, image1, image2, flow, {}, "viper", _viper_truth))
    return Listing(unique(pairs), None, layout)


def _viper_truth(files: FlowFiles) -> Truth:
    assert files.flow is not None
    try:
        with np.load(files.flow) as stored:
            flow = np.stack([stored["u"], stored["v"]]).astype(np.float32)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BadFlow(f"{files.flow}: cut short or no arrays u and v: {error}") from None
    if flow.ndim != 3:
        raise BadFlow(f"{files.flow}: u is {list(flow.shape[1:])}; it must be [H, W]")
    known = (np.abs(flow) <= VIPER_LIMIT_PX).all(axis=0)
    return Truth(np.where(known, flow, np.float32(np.nan)))


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path)
    except FileNotFoundError:
        raise BadFlow(f"{path}: missing; copy the data set again") from None
    except (OSError, ValueError, EOFError) as error:
        raise BadFlow(f"{path}: cut short or no .npy file: {' '.join(str(error).split())}") from None


def _refuse_unknown(path: Path, flow: np.ndarray, known: np.ndarray) -> None:
    wrong = int((~np.isfinite(flow) & known).any(axis=-1).sum())
    if wrong:
        raise BadFlow(f"{path}: flow of {wrong} pixels is not a number where the mask says it is known")


def _numbers(names: list[str], pattern: str) -> list[int]:
    matches = (re.fullmatch(pattern, name) for name in names)
    return [int(match[1]) for match in matches if match]
