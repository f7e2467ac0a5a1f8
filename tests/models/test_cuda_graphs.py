"""Work repeated as a graph gives what the function gives, and one that does not is never used.

No graph of CUDA can be made here. A stand-in keeps its rule: replaying computes into the same memory, from the memory
that it was recorded with, and changes nothing else.
"""

import contextlib
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kinema.configs import TeachConfig
from kinema.models import cuda_graphs
from kinema.models.cuda_graphs import Graphed, Recording, _rebuilt, _tensors, idle_bytes
from kinema.models.dinoflow.model import FlowModel, FlowModelConfig
from kinema.models.flow import geometry
from kinema.models.flow.raft import family
from kinema.models.flow.raft.network import RAFT
from kinema.models.flow.sea_raft.network import RESNET18, SEARAFT
from kinema.models.flow.smurf.network import SMURF
from kinema.models.flow.waft.network import WAFT
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


def test_a_call_without_memory_is_made_again_without_any_graphs(capsys):
    """Graphs of all functions go, since they share their memory, and what the failed call held has gone before."""
    other, failed = Graphed(lambda x: 2 * x, record), []

    def large(x):
        held = torch.ones(3)
        if other._graphs:
            failed.append(weakref.ref(held))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert [ref() for ref in failed] == [None]
        return x + held

    for _ in range(2):
        other(torch.ones(1))
    assert len(recordings) == 1
    assert Graphed(large, record)(torch.ones(1)).tolist() == [2.0, 2.0, 2.0]
    assert len(failed) == 1 and not other._graphs
    assert capsys.readouterr().err.count("memory ran out: CUDA graphs were dropped") == 1
    for _ in range(3):
        assert other(torch.ones(1)).tolist() == [2.0]
    assert len(recordings) == 2 and not other.why_not  # graphs may be made again


def test_without_memory_and_without_graphs_the_error_is_the_callers(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_all", weakref.WeakSet())
    calls = []

    def large(x):
        calls.append(x)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Graphed(large, record)(torch.ones(1))
    assert len(calls) == 1


def test_the_oldest_graph_goes_before_the_call_that_needs_room():
    seen = []

    def double(x):
        seen.append(len(graphed._graphs))
        return 2 * x

    graphed = Graphed(double, record)
    for size in (1, 2, 3, 4, 5, 6):
        graphed(torch.ones(size))
    assert seen == [1, 2, 3, 4, 4, 4]


@pytest.fixture
def gpu(monkeypatch):
    """What torch.cuda has of streams and graphs, without a GPU: what is asked of it is kept."""
    told = SimpleNamespace(stream="main", pools=[], asked=[], capturing=False, refuses=False)

    class Stream:
        def wait_stream(self, other):
            pass

    main = Stream()
    told.main = told.stream = main

    @contextlib.contextmanager
    def stream(other):
        before, told.stream = told.stream, other
        yield
        told.stream = before

    class Capture:  # as torch.cuda.graph of PyTorch 2.13: an error of CUDA at the end leaves the stream as it is
        def __init__(self, graph, pool=None, stream=None, capture_error_mode="global"):
            assert capture_error_mode == "thread_local"
            told.pools.append(pool)

        def __enter__(self):
            told.stream, told.capturing = Stream(), True

        def __exit__(self, *error):
            told.capturing = False
            if told.refuses:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            told.stream = main

    handles = iter(range(1, 100))
    fakes = {
        "Stream": Stream,
        "stream": stream,
        "graph": Capture,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "current_stream": lambda: told.stream,
        "set_stream": lambda stream: setattr(told, "stream", stream),
        "graph_pool_handle": lambda: (0, next(handles)),
        "is_current_stream_capturing": lambda: told.capturing,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(cuda_graphs._Pool, "current", None)
    return told


def test_all_graphs_of_a_process_work_in_one_pool_for_as_long_as_there_are_any(gpu):
    """A handle whose last graph has gone must not be used again: PyTorch's allocator asserts that."""
    one = cuda_graphs.record_on_gpu(lambda x: 2 * x, (torch.ones(2),))
    two = cuda_graphs.record_on_gpu(lambda x: 3 * x, (torch.ones(3),))
    assert gpu.pools == [(0, 1), (0, 1)] and two.outputs.tolist() == [3.0] * 3
    del one
    three = cuda_graphs.record_on_gpu(lambda x: 3 * x, (torch.ones(3),))
    assert gpu.pools[-1] == (0, 1)
    del two, three
    cuda_graphs.record_on_gpu(lambda x: 3 * x, (torch.ones(3),))
    assert gpu.pools[-1] == (0, 2)


def test_a_recording_that_cuda_breaks_off_leaves_the_thread_on_its_stream(gpu, capsys):
    kept = cuda_graphs.record_on_gpu(lambda x: 2 * x, (torch.ones(2),))
    gpu.refuses = True
    double = Graphed(lambda x: 2 * x)
    for _ in range(3):
        assert double(torch.ones(3)).tolist() == [2.0] * 3
        assert gpu.stream is gpu.main
    assert "previous error during capture" in double.why_not and "goes on without" in capsys.readouterr().err
    gpu.refuses = False
    cuda_graphs.record_on_gpu(lambda x: 2 * x, (torch.ones(2),))
    assert gpu.pools == [(0, 1), (0, 1), (0, 2)] and kept.inputs  # that pool may still be open


def test_the_lookup_is_chosen_before_a_recording_and_stays(gpu, monkeypatch):
    """The device's free memory is not asked for while it records, and what only graphs may use is not free."""
    device, free = torch.device("cuda", 0), [64 * 2**30]

    def ask(of):
        assert not gpu.capturing
        gpu.asked.append(of)
        return free[0]

    def segments(handle):
        sizes = [(0, 3 * 2**30, 2**30), (1, 2**40, 0)]
        return [dict(device=d, total_size=t, allocated_size=a) for d, t, a in sizes]

    monkeypatch.setattr(family, "free_memory", ask)
    monkeypatch.setattr(family, "_last_free", {})
    monkeypatch.setattr(torch.cuda, "memory_snapshot", segments, raising=False)
    plans = []

    def function(x):
        plans.append(family.choose_lookup("auto", (1, 256, 55, 128), 12, device, 4))
        free[0] //= 2  # whatever the device would say next
        return 2 * x

    recording = cuda_graphs.record_on_gpu(function, (torch.ones(2),))
    assert len(gpu.asked) == 2 and len(plans) == 3 and plans[2] == plans[1] != plans[0]
    assert idle_bytes(device) == 2 * 2**30 and idle_bytes(torch.device("cpu")) == 0
    free[0] = 64 * 2**30
    function(torch.ones(2))
    assert plans[-1].free_bytes == 62 * 2**30
    del recording
    assert idle_bytes(device) == 0


FROM_HOST = ("tensor", "new_tensor", "as_tensor", "asarray", "from_numpy", "cpu", "numpy")
WAITS = ("item", "tolist", "nonzero", "argwhere", "__bool__", "__int__", "__float__", "__index__")


class RefusesHost(TorchFunctionMode):
    """Fails at what brings numbers from the host to a device, or back, which no CUDA graph can record."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in FROM_HOST + WAITS:
            raise AssertionError(f"{name} is called")
        return func(*args, **(kwargs or {}))


class RefusesOtherDevices(TorchDispatchMode):
    """Fails at an operation that reads or makes a tensor elsewhere than on the device, and at those that wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = {t.device.type for t in tree_iter((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        assert found <= {"meta"}, f"{func} has tensors on {found}"
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select"), name
        return out


NETWORKS = {
    "raft": lambda: RAFT("small", lookup="volume"),
    "smurf": lambda: SMURF(lookup="volume"),
    "sea_raft": lambda: SEARAFT(RESNET18, scale=-1, lookup="volume"),
    "waft": lambda: WAFT("vits", "vitt", scale=-1),
    "dinoflow": lambda: FlowModel(FlowModelConfig("vits16", 64)),
    "dinoflow, patches of 14": lambda: FlowModel(FlowModelConfig("dinov2_vits14", 64)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_nothing_from_the_host(name):
    """Shapes only (device meta), which go the way of a GPU in all but the kernels that stand in for references."""
    with torch.device("meta"):
        made = NETWORKS[name]()
    network = made.to("meta").eval()  # buffers that are made from numbers of the host
    images = torch.rand(2, 3, 136, 150, device="meta")
    with torch.inference_mode(), RefusesHost(), RefusesOtherDevices():
        features = network.encode(images)
        flow = network.flow_from_features(features[:1], features[1:], iters=1)
        if hasattr(network, "prediction_from_features"):
            _, info = network.prediction_from_features(features[:1], features[1:], iters=1)
            network.uncertainty(info.float())
    assert flow.shape == (1, 2, 136, 150)


def test_a_copy_from_the_host_is_noticed():
    """The modes of the test above, on what the networks had."""
    x = torch.ones(2, device="meta")
    with RefusesHost(), pytest.raises(AssertionError, match="new_tensor"):
        x.new_tensor([1.0, 2.0])
    with RefusesHost(), pytest.raises(AssertionError, match="item"):
        x.sum().item()
    with RefusesOtherDevices(), pytest.raises(AssertionError, match="has tensors on"):
        torch.ones(2).to("meta")
    with RefusesHost(), RefusesOtherDevices():
        assert geometry.filled(x, 1.0, 2.0).device.type == "meta"
