"""Layouts of recorded data sets, whose flow is measured: KITTI 2012 and 2015, HD1K, Middlebury.

Sources: Geiger et al. (KITTI 2012) CVPR 2012; Menze and Geiger (KITTI 2015) CVPR 2015; Kondermann et al. (HD1K) CVPR
Workshops 2016; Baker et al. (Middlebury) IJCV 2011.
"""

from __future__ import annotations

import re
from functools import partial
from itertools import pairwise
from pathlib import Path

from kinema.pipelines.flow_datasets.listing import Folder, Listing, Selection, unique
from kinema.pipelines.flow_datasets.sample import FlowFiles, Truth, read_flow_file
from kinema.pipelines.sidecars.flow_files import valid_pixels

KITTI_PAIRS = {("2012", "training"): 194, ("2012", "test"): 195, ("2015", "training"): 200, ("2015", "test"): 200}
HD1K_PAIRS = {"training": 1047}
MIDDLEBURY_TRAINING = "Dimetrodon Grove2 Grove3 Hydrangea RubberWhale Urban2 Urban3 Venus".split()
MIDDLEBURY_TEST = (
    "Army Backyard Basketball Dumptruck Evergreen Grove Mequon Schefflera Teddy Urban Wooden Yosemite".split()
)


def kitti(year: str, folder: Folder, want: Selection) -> Listing:
    """`training/image_2/000000_10.png`, `_11.png`, `flow_occ/000000_10.png`, `flow_noc/`; `testing/` without flow.

    2012: `colored_0` (or `image_0`, grey) instead of `image_2`. `flow_px` is flow_occ, all pixels with a measurement;
    those of them that flow_noc lacks are `occlusion`. A flat folder of one pair (frame1.png, frame2.png, flow_gt.png)
    serves as well.
    """
    part = "testing" if want.split == "test" else "training"
    layout = f"{part}/image_2/000000_10.png, _11.png and flow_occ/000000_10.png (2012: colored_0)"
    names = folder.names()
    if "flow_gt.png" in names and want.split == "training":
        image1, image2, flow = (folder.root / name for name in ("frame1.png", "frame2.png", "flow_gt.png"))
        pair = FlowFiles(folder.root.name, folder.root.name, 10, 1, image1, image2, flow, group="kitti")
        return Listing([pair], KITTI_PAIRS[year, "training"], layout)
    expected = KITTI_PAIRS.get((year, want.split))
    if expected is None:
        return Listing([], 0, layout)
    base = folder.root / part if part in names or "flow_occ" not in names else folder.root
    choices = ("colored_0", "image_0") if year == "2012" else ("image_2",)
    kind = next((c for c in (*choices, "image_2", "colored_0") if folder.names(str(base), c)), choices[0])
    numbers = {
        int(name[:6])
        for place in (kind, "flow_occ")
        for name in folder.names(str(base), place)
        if re.fullmatch(r"\d{6}_10\.png", name)
    } | set(range(expected))
    has_noc = bool(folder.names(str(base), "flow_noc"))
    return Listing([_kitti(base, kind, n, part == "testing", has_noc) for n in sorted(numbers)], expected, layout)


def _kitti(base: Path, kind: str, number: int, withheld: bool, has_noc: bool) -> FlowFiles:
    name = f"{number:06d}_10.png"
    return FlowFiles(
        id=f"{number:06d}_10",
        scene=f"{number:06d}",
        frame=10,
        gap=1,
        image1=base / kind / name,
        image2=base / kind / f"{number:06d}_11.png",
        flow=None if withheld else base / "flow_occ" / name,
        masks={"noc": base / "flow_noc" / name} if has_noc and not withheld else {},
        group="kitti",
        read_truth=None if withheld else _kitti_truth,
    )


def _kitti_truth(files: FlowFiles) -> Truth:
    assert files.flow is not None
    flow = read_flow_file(files.flow)
    if "noc" not in files.masks:
        return Truth(flow)
    seen = valid_pixels(read_flow_file(files.masks["noc"]))
    occlusion = valid_pixels(flow) & ~seen if seen.shape == flow.shape[1:] else ~seen
    return Truth(flow, occlusion)


def hd1k(folder: Folder, want: Selection) -> Listing:
    """`hd1k_input/image_2/000000_0010.png` and `hd1k_flow_gt/flow_occ/000000_0010.png`, flow to the next image.

    The last flow of a sequence leads to an image that was not published, and is left out.
    """
    layout = "hd1k_input/image_2/000000_0010.png and hd1k_flow_gt/flow_occ/000000_0010.png"
    if want.split == "validation":
        return Listing([], 0, layout)
    withheld = want.split == "test"
    images = folder.root / ("hd1k_challenge" if withheld else "hd1k_input") / "image_2"
    flows = folder.root / "hd1k_flow_gt" / "flow_occ"
    frames: dict[str, set[int]] = {}
    for place in (images,) if withheld else (images, flows):
        for name in folder.names(str(place)):
            if match := re.fullmatch(r"(\d{6})_(\d+)\.png", name):
                frames.setdefault(match[1], set()).add(int(match[2]))
    pairs = []
    for scene, numbers in frames.items():
        for first, second in pairwise(sorted(numbers)):
            names = [f"{scene}_{n:04d}.png" for n in (first, second)]
            flow = None if withheld else flows / names[0]
            stem = f"{scene}_{first:04d}"
            gap = second - first
            pairs.append(FlowFiles(stem, scene, first, gap, images / names[0], images / names[1], flow, {}, "hd1k"))
    return Listing(unique(pairs), HD1K_PAIRS.get(want.split), layout)


def middlebury(folder: Folder, want: Selection) -> Listing:
    """`other-data/NAME/frame10.png`, `frame11.png`, `other-gt-flow/NAME/flow10.flo`; `eval-data/` without flow.

    A flat folder of NAME1.png, NAME2.png, NAME_flow10.flo serves as well.
    """
    layout = "other-data/NAME/frame10.png, frame11.png and other-gt-flow/NAME/flow10.flo"
    if want.split == "validation":
        return Listing([], 0, layout)
    if want.split == "test":
        pairs = [_middlebury(folder.root, name, "eval-data", "") for name in MIDDLEBURY_TEST]
        return Listing(pairs, len(pairs), layout)
    flat = [n.removesuffix("_flow10.flo") for n in folder.names() if n.endswith("_flow10.flo")]
    data = next((d for d in ("other-data", "images") if folder.names(d)), "other-data")
    flows = next((d for d in ("other-gt-flow", "flow") if folder.names(d)), "other-gt-flow")
    names = sorted({*([] if flat else MIDDLEBURY_TRAINING), *folder.names(flows)})
    pairs = [_middlebury(folder.root, name, data, flows) for name in names]
    for name in flat:
        image1, image2 = (folder.root / f"{name}{k}.png" for k in (1, 2))
        flow = folder.root / f"{name}_flow10.flo"
        pairs.append(FlowFiles(name, name, 10, 1, image1, image2, flow, group="middlebury"))
    return Listing(unique(pairs), len(MIDDLEBURY_TRAINING), layout)


def _middlebury(root: Path, name: str, data: str, flows: str) -> FlowFiles:
    image1, image2 = (root / data / name / f"frame{n}.png" for n in (10, 11))
    flow = root / flows / name / "flow10.flo" if flows else None
    return FlowFiles(name, name, 10, 1, image1, image2, flow, group="middlebury")


kitti2012, kitti2015 = partial(kitti, "2012"), partial(kitti, "2015")
