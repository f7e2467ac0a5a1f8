"""The plain network of the benchmarks computes what ours computes, and the benchmark says so."""

import pytest
import torch

from kinema.models.flow.raft.network import raft, raft_small
from kinema.models.flow.sea_raft.network import sea_raft_s
from kinema.models.tracks.cotracker3.network import cotracker3
from kinema.pipelines.bench import against_plain, plain_sea_raft, teacher, tracker
from kinema.pipelines.bench.plain_cotracker3 import plain, plain_tracks
from kinema.pipelines.bench.plain_raft import plain_predictions
from kinema.pipelines.precision import cpu_multiplies_bf16


@pytest.mark.parametrize("build", [raft, raft_small])
def test_the_plain_network_gives_the_flow_of_every_iteration(build):
    torch.manual_seed(0)
    network = build()
    first, second = torch.rand(2, 2, 3, 128, 136)
    with torch.no_grad():
        plain, ours = plain_predictions(network, first, second, 3), network.predictions(first, second, 3)
    assert len(plain) == len(ours) == 3
    for found, wanted in zip(plain, ours, strict=True):
        assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_plain_sea_raft_gives_flow_and_mixture_of_every_step():
    torch.manual_seed(0)
    network = sea_raft_s()
    first, second = torch.rand(2, 2, 3, 128, 136)
    with torch.no_grad():
        plain_ones = plain_sea_raft.plain_predictions(network, first, second, 2)
        ours = network.predictions(first, second, 2)
    assert len(plain_ones) == len(ours) == 3
    for found, wanted in zip(plain_ones, ours, strict=True):
        for a, b in zip(found, wanted, strict=True):
            assert (a - b).abs().max() < 2e-5 * b.abs().max()


def test_plain_cotracker3_gives_the_tracks():
    torch.manual_seed(0)
    network = cotracker3()
    video, queries = 255 * torch.rand(1, 3, 3, 64, 72), torch.tensor([[[0.0, 9, 30], [2, 50, 11], [0, 60, 60]]])
    with torch.no_grad():
        found, wanted = plain_tracks(plain(network), video, queries, 2), network(video, queries, 2)
    assert (found.tracks - wanted.tracks).abs().max() < 2e-4
    assert (found.visibility - wanted.visibility).abs().max() < 2e-5
    assert (found.confidence - wanted.confidence).abs().max() < 2e-5


def check_rows(rows, name):
    """Speed, bf16 where this CPU has it, and agreement."""
    speed, difference = rows[name], rows[f"{name}, largest difference"]
    assert speed["ratio"] == pytest.approx(speed["value"] / speed["baseline"])
    assert 0 < difference["value"] < 1e-3
    if cpu_multiplies_bf16():
        assert rows[f"{name}, products in bf16"]["baseline"] == speed["baseline"]
        assert rows[f"{name}, mean difference"]["value"] > difference["value"] / 10


def test_the_table_compares_speed_agreement_and_memory(monkeypatch):
    monkeypatch.setattr(against_plain, "ROUNDS", 1)
    small = {"side": 128, "num_frames": 3, "iters": 2, "half_hd": (132, 128), "full_hd": (128, 128)}
    rows = {row["name"]: row for row in teacher.run(**small)}
    for name in ("RAFT 128x128, 2", "RAFT-small 128x128, 2", "SEA-RAFT M 132x128, 4"):
        check_rows(rows, f"{name} iterations")
    check_rows(rows, "SEA-RAFT M, one pair alone 132x128, 4 iterations")
    memory = rows["RAFT 128x128, one pair, peak memory of the process"]
    assert 0.1 < memory["value"] < 2


def test_the_table_of_the_tracker(monkeypatch):
    monkeypatch.setattr(against_plain, "ROUNDS", 1)
    rows = {row["name"]: row for row in tracker.run(height=64, width=64, num_frames=3, grid=2, iters=2)}
    check_rows(rows, "CoTracker3 64x64, 3 frames, 4 points, 2 iterations")
