"""The plain network of the benchmarks computes what ours computes, and the benchmark says so."""

import pytest
import torch

from kinema.models.flow.raft.network import raft, raft_small
from kinema.pipelines.bench import teacher
from kinema.pipelines.bench.plain_raft import plain_predictions


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


def test_the_table_compares_speed_agreement_and_memory(monkeypatch):
    monkeypatch.setattr(teacher, "ROUNDS", 1)
    rows = {row["name"]: row for row in teacher.run(side=128, num_frames=3, iters=2, full_hd=(128, 128))}
    for name in ("RAFT", "RAFT-small"):
        speed = rows[f"{name} 128x128, 2 iterations"]
        difference = rows[f"{name} 128x128, 2 iterations, largest difference"]
        assert speed["ratio"] == pytest.approx(speed["value"] / speed["baseline"])
        assert 0 < difference["value"] < 1e-3
    memory = rows["RAFT 128x128, one pair, peak memory of the process"]
    assert 0.1 < memory["value"] < 2
