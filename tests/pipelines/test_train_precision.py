"""Which precision a training multiplies in, and that a run goes on in the one it began with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from kinema.configs import TrainConfig
from kinema.pipelines import precision
from kinema.pipelines.train import checkpoint
from kinema.pipelines.train.loop import train_worker
from kinema.pipelines.train.parallel import Place
from kinema.pipelines.train.recipes.flowfeat import FlowFeatRecipe
from kinema.pipelines.train.stop import Stop

sys.path.insert(0, str(Path(__file__).parent))
from toy_training import ToyRecipe, toy_job

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Compared(ToyRecipe):
    """Notes down what a product of matrices comes out in."""

    learns_in_bf16 = True
    seen: list[torch.dtype] = []

    def loss(self, module, batch):
        self.seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return super().loss(module, batch)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_is_bf16_on_a_cpu_only_with_instructions_and_a_model_that_was_compared(monkeypatch, has_bf16):
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: has_bf16)
    assert precision.choose("auto", CPU, ToyRecipe()) == "fp32"
    assert precision.choose("auto", CPU, Compared()) == ("bf16" if has_bf16 else "fp32")
    for gpu_has in (True, False):
        monkeypatch.setattr(precision, "gpu_multiplies_bf16", lambda gpu_has=gpu_has: gpu_has)
        assert precision.choose("auto", GPU, ToyRecipe()) == ("bf16" if gpu_has else "fp32")
    assert precision.choose("fp32", CPU, Compared()) == precision.choose("fp32", GPU, ToyRecipe()) == "fp32"
    assert FlowFeatRecipe.learns_in_bf16


def test_a_run_goes_on_as_it_began_on_another_machine(monkeypatch, tmp_path):
    def train(steps: int, name: str) -> dict:
        config = TrainConfig(steps=steps, batch_size=4, lr=0.01, pictures_every=0, precision=name, use_gpu="no")
        Compared.seen.clear()
        train_worker(toy_job(tmp_path, config, Compared()), Place(), Stop())
        return checkpoint.read_meta(checkpoint.latest_checkpoint(tmp_path))

    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    assert train(2, "auto")["precision"] == "bf16"
    assert set(Compared.seen) == {torch.bfloat16}
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    assert train(4, "auto")["precision"] == "bf16"
    assert set(Compared.seen) == {torch.bfloat16} and len(Compared.seen) == 2
