"""The models that kinema comes with: a row each, in the order in which people should see them."""

from __future__ import annotations

from typing import Any

from kinema.configs.models.dinoflow import DinoFlowConfig
from kinema.configs.models.dismo import DisMoConfig
from kinema.configs.models.flow_network import FlowNetworkConfig
from kinema.configs.models.flowfeat import FlowFeatConfig
from kinema.configs.models.fpt import FPTConfig
from kinema.configs.models.row import ModelRow, TeacherFacts, TrackerFacts
from kinema.configs.models.transfer import TransferTrainingConfig

_RAFT_TEACHER = "kinema.pipelines.teach.teachers:RAFTTeacher"
_MIXTURE_TEACHER = "kinema.pipelines.teach.teachers:MixtureTeacher"
_FLOW_BENCHMARKS = ("sintel", "kitti", "middlebury", "flow")


def _flow_network(
    name: str, title: str, summary: str, network: str, parameters: int, teacher: TeacherFacts, **others: Any
) -> ModelRow:
    """A row of the RAFT family: `network` is its class, beside whose module's function `name` builds it."""
    return ModelRow(
        name=name,
        title=title,
        kind="flow",
        summary=summary,
        network=network,
        build=f"{network.partition(':')[0]}:{name}",
        hub=name,
        parameters=parameters,
        teacher=teacher,
        recipe="kinema.pipelines.train.recipes.flow:FlowRecipe",
        settings=FlowNetworkConfig,
        section="flow_network",
        benchmarks=_FLOW_BENCHMARKS,
        serving="flow",
        registered_name=f"kinema-{name.replace('_', '-')}",
        **{"needs": ("flow",), "weights": name} | others,
    )


def _sea_raft(size: str, parameters: int, iters: int, published: dict[str, str]) -> ModelRow:
    return _flow_network(
        f"sea_raft_{size}",
        f"SEA-RAFT {size.upper()}",
        "RAFT with a mixture loss and a first guess, in 4 refinements (L: 12); states its own uncertainty.",
        "kinema.models.flow.sea_raft.network:SEARAFT",
        parameters,
        TeacherFacts(_MIXTURE_TEACHER, iters, takes_scale=True, gives_uncertainty=True),
        published=published,
    )


def _alltracker(name: str, title: str, parameters: int, published: dict[str, str]) -> ModelRow:
    return ModelRow(
        name=name,
        title=title,
        kind="tracks",
        summary="Every pixel of a frame in every other one, with visibility: dense tracks, or flow over long gaps.",
        network="kinema.models.tracks.alltracker.network:AllTracker",
        build=f"kinema.models.tracks.alltracker.network:{name}",
        hub="alltracker",
        weights=name,
        parameters=parameters,
        published=published,
        tracker=TrackerFacts(
            "kinema.pipelines.track.trackers:AllTrackerTracker",
            "kinema.pipelines.evaluate.tapvid.trackers:alltracker_benchmark",
            iters=4,
            actor_bytes=6 << 30,
        ),
        teacher=TeacherFacts(
            "kinema.pipelines.teach.dense_tracks:DenseTracksTeacher",
            4,
            sees_occlusion=True,
            actor_bytes=6 << 30,
        ),
        benchmarks=("tapvid",),
    )


ROWS = (
    ModelRow(
        name="flowfeat",
        title="FlowFeat",
        kind="features",
        summary="Pixel-dense motion features: a frozen vision transformer under a decoder distilled from flow.",
        network="kinema.models.flowfeat.model:FlowFeat",
        build="kinema.models.flowfeat.model:flowfeat",
        presets="kinema.models.flowfeat.model:NAMES",
        hub="flowfeat",
        weights="flowfeat/dinov2_vits14_yt",
        recipe="kinema.pipelines.train.recipes.flowfeat:FlowFeatRecipe",
        settings=FlowFeatConfig,
        section="flowfeat",
        needs=("flow",),
        benchmarks=("davis",),
        serving="features",
        registered_name="kinema-flowfeat",
        demo="kinema.pipelines.demo:demo",
    ),
    ModelRow(
        name="fpt",
        title="Flow Poke Transformer",
        kind="pokes",
        summary="The distribution of motion at any point of an image, given the motion of a few.",
        network="kinema.models.fpt.model:FlowPokeTransformer",
        build="kinema.models.fpt.model:flow_poke_transformer",
        presets="kinema.models.fpt.model:PRESETS",
        hub="fpt_base",
        weights="fpt_base",
        parameters=233_475_768,
        recipe="kinema.pipelines.train.recipes.fpt.recipe:FPTRecipe",
        settings=FPTConfig,
        section="fpt",
        needs=("tracks",),
        benchmarks=("pokes", "moving_part"),
        serving="pokes",
        registered_name="kinema-fpt",
        demo="kinema.pipelines.page:demo",
    ),
    ModelRow(
        name="dismo",
        title="DisMo",
        kind="motion",
        summary="An embedding per frame of how a video moves, apart from what it shows.",
        network="kinema.models.dismo.motion_extractor:MotionExtractor",
        build="kinema.models.dismo.motion_extractor:motion_extractor",
        presets="kinema.models.dismo.motion_extractor:NAMES",
        hub="motion_extractor_large",
        weights="motion_extractor_large",
        parameters=594_349_888,
        published={"kNN ARID / Jester / SSv2 / IARD": "57.3 / 56.7 / 22.2 / 90.7"},
        recipe="kinema.pipelines.train.recipes.dismo.recipe:DisMoRecipe",
        settings=DisMoConfig,
        section="dismo",
        benchmarks=("knn",),
        serving="motion",
        registered_name="kinema-dismo",
    ),
    ModelRow(
        name="cogvideox5b_i2v_large",
        title="DisMo's motion transfer",
        kind="video",
        summary="A video that continues a picture and moves as another one does: CogVideoX under a motion adapter.",
        network="kinema.models.dismo.transfer.model:MotionTransfer",
        build="kinema.models.dismo.transfer.model:cogvideox5b_i2v_large",
        hub="cogvideox5b_i2v_large",
        weights="cogvideox5b_i2v_large",
        published={"motion fidelity / prompt adherence / temporal consistency": "0.75 / 0.27 / 0.95"},
        recipe="kinema.pipelines.train.recipes.transfer.recipe:TransferRecipe",
        settings=TransferTrainingConfig,
        section="transfer",
    ),
    ModelRow(
        name="dis",
        title="DIS",
        kind="flow",
        summary="OpenCV's Dense Inverse Search; needs no weights.",
        network="kinema.models.flow.dis:DIS",
        build="kinema.models.flow.networks:dis",
        teacher=TeacherFacts("kinema.pipelines.teach.teachers:DISTeacher", needs_weights=False, actor_bytes=0),
        benchmarks=_FLOW_BENCHMARKS,
    ),
    _flow_network(
        "raft",
        "RAFT",
        "Recurrent refinement of flow by looking up all-pairs correlations.",
        "kinema.models.flow.raft.network:RAFT",
        5_257_536,
        TeacherFacts(_RAFT_TEACHER, 20, takes_padding=True),
        published={"Sintel clean / final": "1.43 / 2.71", "KITTI-15 EPE / Fl-all": "5.04 / 17.4 %"},
    ),
    _flow_network(
        "raft_small",
        "RAFT-small",
        "RAFT with a fifth of its parameters.",
        "kinema.models.flow.raft.network:RAFT",
        990_162,
        TeacherFacts(_RAFT_TEACHER, 20, takes_padding=True),
        published={"Sintel clean / final": "2.21 / 3.35", "KITTI-15 EPE / Fl-all": "7.51 / 26.9 %"},
    ),
    _sea_raft("s", 8_883_460, 4, {"Sintel clean / final": "1.27 / 3.74", "KITTI-15 EPE / Fl-all": "4.43 / 15.1 %"}),
    _sea_raft("m", 19_663_876, 4, {"Sintel clean / final": "1.21 / 4.04", "KITTI-15 EPE / Fl-all": "4.29 / 14.2 %"}),
    _sea_raft("l", 19_663_876, 12, {"Sintel clean / final": "1.19 / 4.11", "KITTI-15 EPE / Fl-all": "3.62 / 12.9 %"}),
    _flow_network(
        "smurf",
        "SMURF",
        "RAFT trained on frames alone, without labels.",
        "kinema.models.flow.smurf.network:SMURF",
        5_254_656,
        TeacherFacts(_RAFT_TEACHER, 12, takes_padding=True),
        needs=(),
        weights="",
    ),
    _flow_network(
        "waft",
        "WAFT",
        "Warps features by the current flow instead of correlating them; a frozen depth network inside.",
        "kinema.models.flow.waft.network:WAFT",
        64_145_068,
        TeacherFacts(_MIXTURE_TEACHER, 5, takes_scale=True, gives_uncertainty=True, actor_bytes=6 << 30),
        published={"Sintel clean / final": "1.00 / 2.15", "KITTI-15 EPE / Fl-all": "3.10 / 10.3 %"},
    ),
    ModelRow(
        name="dinoflow",
        title="DinoFlow",
        kind="flow",
        summary="Flow in one pass from a frozen DINOv3: local correlations under a light upsampling head.",
        network="kinema.models.dinoflow.model:FlowModel",
        build="kinema.models.dinoflow.model:dinoflow",
        hub="dinoflow_vits16",
        weights="dinoflow_vits16",
        parameters=28_485_862,
        published={"Sintel clean / final": "3.97 / 5.06", "KITTI-15 EPE / Fl-all": "19.79 / 61.6 %"},
        recipe="kinema.pipelines.train.recipes.dinoflow:DinoFlowRecipe",
        settings=DinoFlowConfig,
        section="dinoflow",
        needs=("flow",),
        teacher=TeacherFacts("kinema.pipelines.teach.teachers:DinoFlowTeacher"),
        benchmarks=_FLOW_BENCHMARKS,
        serving="flow",
        registered_name="kinema-dinoflow",
    ),
    ModelRow(
        name="consensus",
        title="consensus",
        kind="flow",
        summary="At each pixel the best supported of several teachers' stored flow; needs no weights.",
        teacher=TeacherFacts(
            "kinema.pipelines.teach.consensus:ConsensusTeacher",
            needs_weights=False,
            gives_uncertainty=True,
            judges_flow=True,
            actor_bytes=2 << 30,
        ),
    ),
    ModelRow(
        name="chain",
        title="chain",
        kind="tracks",
        summary="Chained stored flow; needs no weights.",
        tracker=TrackerFacts(
            "kinema.pipelines.track.trackers:ChainTracker",
            "kinema.pipelines.evaluate.tapvid.trackers:chain_benchmark",
            needs_weights=False,
            follows_flow=True,
        ),
        benchmarks=("tapvid",),
    ),
    ModelRow(
        name="cotracker3",
        title="CoTracker3",
        kind="tracks",
        summary="Joint tracking of points through occlusion, offline.",
        network="kinema.models.tracks.cotracker3.network:CoTracker3",
        build="kinema.models.tracks.cotracker3.network:cotracker3",
        hub="cotracker3",
        weights="cotracker3_offline",
        serving="tracks",
        registered_name="kinema-cotracker3",
        parameters=25_385_700,
        published={"TAP-Vid-DAVIS AJ": "about 62"},
        tracker=TrackerFacts(
            "kinema.pipelines.track.trackers:CoTracker3Tracker",
            "kinema.pipelines.evaluate.tapvid.trackers:cotracker3_benchmark",
            iters=6,
            actor_bytes=6 << 30,
        ),
        benchmarks=("tapvid",),
    ),
    _alltracker("alltracker", "AllTracker", 16_476_962, {"TAP-Vid-DAVIS AJ (768x1024)": "67.2"}),
    _alltracker("alltracker_tiny", "AllTracker tiny", 6_294_050, {}),
)
