"""Batches that are fetched while a step computes: the same ones, and a position that is never ahead of the training."""

import time

import pytest
import torch

from kinema.pipelines.train.feed import Feed


class CountingLoader:
    """Batches 1, 2, 3, ... that each take a while; `handed_out` tells how many were asked for."""

    def __init__(self, takes_s: float = 0.0):
        self.handed_out, self.takes_s = 0, takes_s

    def __iter__(self):
        while True:
            time.sleep(self.takes_s)
            self.handed_out += 1
            yield {"x": torch.tensor([self.handed_out]), "key": [f"clip{self.handed_out}"]}

    def state_dict(self):
        return {"samples_consumed": self.handed_out}


@pytest.mark.parametrize("copy_ahead", ["auto", "on", "off"])
def test_batches_come_in_order_with_the_position_behind_each(copy_ahead):
    loader = CountingLoader()
    feed = Feed(loader, torch.device("cpu"), copy_ahead, steps=4)
    for step in range(1, 5):
        batch, _ = feed.take()
        assert batch["x"].item() == step and batch["key"] == [f"clip{step}"]
        feed.prepare()
        feed.prepare()  # asked twice, fetched once
        ahead = copy_ahead == "on" and step < 4  # nothing is read beyond the last step
        assert loader.handed_out == step + ahead
        assert feed.position == {"samples_consumed": step}


def test_waiting_is_counted_where_nothing_else_was_done_meanwhile():
    feed = Feed(CountingLoader(takes_s=0.05), torch.device("cpu"), "on", steps=3)
    waits = []
    for _ in range(3):
        _, wait_s = feed.take()
        waits.append(wait_s)
        feed.prepare()
    assert all(0.05 <= wait_s < 0.2 for wait_s in waits)  # on a CPU a step's work is done when `prepare` is called


def test_an_error_of_the_loader_reaches_the_step_that_fetches():
    class Failing(CountingLoader):
        def __iter__(self):
            yield {"x": torch.zeros(1)}
            raise OSError("storage is gone")

    feed = Feed(Failing(), torch.device("cpu"), "on", steps=3)
    feed.take()
    with pytest.raises(OSError, match="storage is gone"):
        feed.prepare()
