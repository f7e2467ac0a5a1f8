"""Sharded training: two ranks against one, goes on with another number of ranks, read by those who are no rank."""

import dataclasses
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kinema.configs import DisMoConfig, TrainConfig
from kinema.pipelines import train
from kinema.pipelines.train import checkpoint, load_model
from kinema.pipelines.train.loop import TrainJob, rank_batch_size, train_worker
from kinema.pipelines.train.meter import read_metrics
from kinema.pipelines.train.parallel import Place
from kinema.pipelines.train.recipes.choose import make_recipe
from kinema.pipelines.train.sharded import INDEX_FILE, read_parts
from kinema.pipelines.train.stop import Stop

sys.path.insert(0, str(Path(__file__).parent))
from toy_training import ToyRecipe, toy_job

SKIPPED = (1, 2, 3, 5, 8, 13)


class ShardedToy(ToyRecipe):
    """The toy's networks are units."""

    def __init__(self):
        super().__init__(noise=0)

    def shard_units(self, module):
        return [module.online, module.average]


def config(**changes) -> TrainConfig:
    defaults = dict(
        steps=8, batch_size=4, lr=0.01, checkpoint_every=4, log_every=2, pictures_every=4, seed=3, clip_norm=1.0,
        num_workers=2, use_gpu="no", sharding="full", keep_checkpoints=5,
    )  # fmt: skip
    return TrainConfig(**(defaults | changes))


class Frames:
    """Batches as DisMo's loader makes them, the same on any number of ranks together."""

    def __init__(self, cfg, place):
        self.size, self.place, self.consumed = rank_batch_size(cfg, place.world_size), place, 0

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(self.consumed)
            count = self.size * self.place.world_size
            mine = slice(self.place.rank, None, self.place.world_size)
            drawn = {"motion": (count, 8, 32, 32, 3), "source": (count, 4, 32, 32, 3), "target": (count, 4, 32, 32, 3)}
            pixels = {"generator": generator, "dtype": torch.uint8}
            batch = {name: torch.randint(0, 256, size, **pixels)[mine] for name, size in drawn.items()}
            self.consumed += count
            yield {**batch, "delta_time": torch.ones(self.size, 4), "key": [""] * self.size}

    def state_dict(self):
        return {"samples_consumed": self.consumed}

    def load_state_dict(self, state):
        self.consumed = state["samples_consumed"]

    def stats(self):
        return {}

    def close(self):
        pass


@dataclasses.dataclass(frozen=True)
class MakeFrames:
    config: TrainConfig

    def __call__(self, place):
        return Frames(self.config, place)


def dismo_config(**changes) -> TrainConfig:
    settings = DisMoConfig(
        preset="dismo_tiny", autoencoder="pixels", pixels_per_latent=4, frame_px=32, sample_steps=1, ema_every=1,
        checkpoint_layers=True,
    )  # fmt: skip
    return config(**(dict(model="dismo", settings=settings, lr=1e-3, steps=2, checkpoint_every=1) | changes))


def dismo_job(folder: Path, cfg: TrainConfig) -> TrainJob:
    return TrainJob(cfg, make_recipe(cfg), MakeFrames(cfg), folder, {"model": "dismo"})


def one_rank(rank: int, folder: Path) -> None:
    """A rank of two, without Ray: the toy's first half, then DisMo."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "rendezvous"), 2), rank=rank, world_size=2)
    place = Place(rank, 2)
    for name in ("toy", "dismo", "dismo_whole"):
        (folder / name).mkdir(exist_ok=True)
    train_worker(toy_job(folder / "toy", config(steps=4), ShardedToy(), SKIPPED), place, Stop())
    train_worker(dismo_job(folder / "dismo", dismo_config()), place, Stop())
    train_worker(dismo_job(folder / "dismo_whole", dismo_config(sharding="none")), place, Stop())
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    mp.start_processes(one_rank, (folder,), nprocs=2, start_method="spawn")
    return folder


pytestmark = pytest.mark.slow


def tensors(run: Path) -> dict:
    return checkpoint.read_tensors(checkpoint.latest_checkpoint(run))


def test_two_sharded_ranks_then_one_equal_one_all_along(two_ranks, tmp_path):
    """Each rank's file holds a part; one rank takes up both and ends where one rank alone does."""
    newest = checkpoint.latest_checkpoint(two_ranks / "toy")
    assert newest.name == "step_00000004" and checkpoint.is_sharded(newest)
    assert len(list(newest.glob("*.distcp"))) == 2 and not (newest / "model.safetensors").exists()
    whole = config(num_workers=1)
    train_worker(toy_job(tmp_path, whole, ShardedToy(), SKIPPED), Place(), Stop())
    four = checkpoint.read_tensors(checkpoint.checkpoint_folder(tmp_path, 4))
    found = tensors(two_ranks / "toy")
    assert set(found) == set(four)
    for name, value in four.items():
        torch.testing.assert_close(found[name], value, atol=2e-6, rtol=1e-5, msg=name)
    train_worker(toy_job(two_ranks / "toy", whole, ShardedToy(), SKIPPED), Place(), Stop())
    for name, value in tensors(tmp_path).items():
        torch.testing.assert_close(tensors(two_ranks / "toy")[name], value, atol=5e-6, rtol=1e-5, msg=name)
    pairs = zip(read_metrics(tmp_path), read_metrics(two_ranks / "toy"), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-4) for a, b in pairs)


def test_dismo_sharded_equals_whole_on_every_rank(two_ranks):
    """Weights, average and losses after two steps are those of two ranks under DDP; anybody reads the run."""
    whole, sharded = tensors(two_ranks / "dismo_whole"), tensors(two_ranks / "dismo")
    assert set(whole) == set(sharded)
    # Adam divides by the gradient's size: where that is next to nothing, rounding decides on a step of 1e-3.
    far = {name: (sharded[name].float() - value.float()).abs() for name, value in whole.items()}
    share = sum(int((value > 1e-5).sum()) for value in far.values()) / sum(value.numel() for value in far.values())
    assert share < 1e-3, share
    pairs = zip(read_metrics(two_ranks / "dismo_whole"), read_metrics(two_ranks / "dismo"), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-5) for a, b in pairs)
    assert len(list((two_ranks / "dismo" / "pictures").iterdir())) == 1
    model = load_model(two_ranks / "dismo")
    assert model.forward_sliding(torch.zeros(1, 9, 32, 32, 3)).shape == (1, 5, 32)


def test_the_index_runs_no_code(two_ranks, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    (tmp_path / INDEX_FILE).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="not an index of parts"):
        read_parts(tmp_path)


def test_parts_that_no_folder_would_bring_together_are_refused(monkeypatch):
    config = TrainConfig(
        model="dismo", clips="clips", out="memory://bucket/run", sharding="full", num_workers=2, batch_size=2
    )
    monkeypatch.setenv("KINEMA_ENGINE", "ray")
    monkeypatch.setattr(train.engine, "num_nodes", lambda: 2)
    with pytest.raises(ValueError, match=r"out=memory://bucket/run: with sharding=full .* nodes have none in common"):
        train.run(config)


def test_a_model_without_units_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    given = dict(model="raft_small", clips=str(tmp_path), flow=str(tmp_path), out=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="sharding=full is not for model=raft_small; use sharding=none"):
        train.run(TrainConfig(**given, sharding="full"))
