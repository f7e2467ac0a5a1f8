"""The benchmark's baseline computes what it is compared with."""

import torch

from kinema.models.raft import raft
from kinema.pipelines.bench.train_step import published_raft


def test_the_published_form_of_raft_gives_the_same_flow():
    torch.manual_seed(0)
    ours, published = raft().eval(), published_raft()
    published.load_state_dict(ours.state_dict())
    first, second = torch.rand(2, 1, 3, 128, 136)
    with torch.no_grad():
        wanted, found = ours(first, second, iters=3), published.predictions(first, second, iters=3)
    assert len(found) == 3
    torch.testing.assert_close(found[-1], wanted, atol=2e-3, rtol=1e-3)
