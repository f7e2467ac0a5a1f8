"""Work repeated as a graph gives what the function gives, and one that does not is never used.

No graph of CUDA can be made here. A stand-in keeps its rule: replaying computes into the same memory, from the memory
that it was recorded with, and changes nothing else.
"""

import numpy as np
import pytest
import torch

from kinema.configs import TeachConfig
from kinema.models.cuda_graphs import Graphed, Recording, _rebuilt, _tensors
from kinema.models.flow.raft.network import RAFT
from kinema.pipelines.teach import teachers
from kinema.pipelines.teach.protocol import FlowEstimate
from kinema.pipelines.teach.teachers import TeacherSpec

recordings = []


def record(function, arguments) -> Recording:
    inputs = tuple(_rebuilt(argument, iter([t.clone() for t in _tensors(argument)])) for argument in arguments)
    outputs = function(*inputs)

    def replay():
        for place, value in zip(_tensors(outputs), _tensors(function(*inputs)), strict=True):
            place.copy_(value)

    recordings.append(function)
    return Recording(list(_tensors(inputs)), outputs, replay)


@pytest.fixture(autouse=True)
def no_recordings():
    recordings.clear()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return RAFT("small").eval()


def test_a_network_of_features_is_recorded_at_the_second_clip_of_a_size_and_gives_the_same(network):
    """Features are dataclasses with tensors, sizes and a padding; the context may be missing."""
    with torch.inference_mode():
        encode = Graphed(network.encode, record)
        flow = Graphed(lambda a, b: FlowEstimate(network.flow_from_features(a, b, iters=2)), record)
        results = []
        for number, height in enumerate((128, 128, 136, 128, 128)):
            images = torch.rand(2, 3, height, 144, generator=torch.Generator().manual_seed(number))
            features = encode(images)
            assert features.size == (height, 144) and len(features) == 2
            estimate = flow(features[:1], features[1:])
            assert isinstance(estimate, FlowEstimate) and estimate.uncertainty_px is None
            expected = network.flow_from_features(network.encode(images[:1]), network.encode(images[1:]), iters=2)
            results.append((estimate.flow_px, estimate.flow_px.clone()))
            torch.testing.assert_close(estimate.flow_px, expected, rtol=1e-4, atol=1e-4)
        assert len(recordings) == 2  # one each, of the size that came twice
        assert not encode.why_not and not flow.why_not
        for kept, copy in results:  # later calls compute into memory of their own
            assert torch.equal(kept, copy)


def test_few_graphs_are_kept_and_the_oldest_goes():
    double = Graphed(lambda x: 2 * x, record)
    for size in (1, 2, 3, 4, 5, 1, 1, 5, 5):
        assert double(torch.ones(size)).tolist() == [2.0] * size
    assert len(recordings) == 2 and len(double._graphs) == 4  # size 1 had gone when it came again


@pytest.mark.parametrize("what", ["refuses", "is wrong", "is not finite"])
def test_a_graph_that_cannot_be_made_or_repeats_wrongly_is_said_and_not_used(capsys, what):
    def bad(function, arguments):
        if what == "refuses":
            raise RuntimeError("operation not permitted when stream is capturing\nmore of CUDA")
        made = record(function, arguments)
        return made._replace(replay=lambda: made.outputs.fill_(2.02 if what == "is wrong" else float("nan")))

    double = Graphed(lambda x: 2 * x, bad)
    for _ in range(4):
        assert double(torch.ones(3)).tolist() == [2.0] * 3
    said = capsys.readouterr().err
    assert said.count("goes on without CUDA graphs") == 1 and "teach.cuda_graphs=off" in said and "more of" not in said
    reason = "not permitted" if what == "refuses" else "a repetition was off by"
    assert reason in said and reason in double.why_not


def test_an_error_of_the_function_itself_is_its_own():
    def broken(x):
        raise ValueError("images of the wrong shape")

    with pytest.raises(ValueError, match="wrong shape"):
        Graphed(broken, record)(torch.ones(1))


def test_teachers_use_them_on_a_gpu_where_the_setting_allows(monkeypatch):
    """The device is a CPU that calls itself one with graphs: what is switched is looked at, and the flow compared."""
    monkeypatch.setattr(teachers, "Graphed", lambda function: Graphed(function, record))
    spec = TeacherSpec("raft_small", device="cpu", iters=2)
    monkeypatch.setattr(teachers, "flow_network", lambda *args, **kwargs: RAFT("small"))
    plain = spec.load()
    assert not isinstance(plain._estimate, Graphed)
    monkeypatch.setattr(teachers, "_has_graphs", lambda spec: spec.cuda_graphs)
    assert not isinstance(TeacherSpec("raft_small", cuda_graphs=False).load()._estimate, Graphed)
    graphed = spec.load()
    graphed.network.load_state_dict(plain.network.state_dict())
    frames = np.random.default_rng(0).integers(0, 256, (4, 128, 128, 3), dtype=np.uint8)
    for one, other in zip(frames[:-1], frames[1:], strict=True):
        flows = [t.flow([(t.features(one), t.features(other))]).flow_px for t in (plain, graphed)]
        torch.testing.assert_close(*flows, rtol=1e-4, atol=1e-4)
    assert len(recordings) == 2


def test_on_without_a_gpu_is_refused(tmp_path):
    from kinema.pipelines import teach

    spec = TeacherSpec("raft_small")
    with pytest.raises(ValueError, match="cuda_graphs=on: there are none on a CPU; use auto or off"):
        teach._place(TeachConfig(teacher="raft_small", device="cpu", cuda_graphs="on"), spec)
    with pytest.raises(ValueError, match="there are none for teacher=alltracker"):
        teach._place(TeachConfig(teacher="alltracker", device="cpu", cuda_graphs="on"), spec)
