"""The flow sidecar's blob: error bound, saturation, random access, damage."""

import numpy as np
import pytest

from kinema.pipelines.sidecars.flow_codec import (
    FlowBlob,
    FlowPair,
    encode_clip_flow,
    pack_differences,
    unpack_differences,
)


def smooth_flow(seed: int, height: int, width: int, amplitude_px: float = 20.0) -> np.ndarray:
    """A smooth field with a sharp motion edge and sensor-like noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    flow = np.stack([np.sin(x / 17 + y / 29), np.cos(x / 23 - y / 13)]) * amplitude_px
    flow[:, height // 3 :, width // 2 :] += 7.3
    return (flow + rng.normal(0, 0.02, flow.shape)).astype(np.float32)


def encode(pairs, height=37, width=53, frames=9, **kwargs):
    return encode_clip_flow(
        pairs, height=height, width=width, teacher="dis", weights_hash="none", frames=frames, **kwargs
    )


def make_pairs(height=37, width=53):
    rng = np.random.default_rng(5)
    places = [(0, 1), (1, 1), (1, -1), (3, 2), (8, -8)]
    return [
        FlowPair(t, gap, smooth_flow(i, height, width), None if i == 2 else rng.random((height, width)) < 0.1)
        for i, (t, gap) in enumerate(places)
    ]


@pytest.mark.parametrize(("height", "width"), [(37, 53), (1, 1), (1, 9), (9, 1), (64, 96)])
def test_every_pair_comes_back_within_half_a_step(height, width):
    pairs = make_pairs(height, width)
    blob = FlowBlob(encode(pairs, height, width))
    assert blob.pairs == sorted((p.t, p.gap) for p in pairs)
    assert (blob.header.height, blob.header.width, blob.header.frames) == (height, width, 9)
    assert (blob.header.teacher, blob.header.weights_hash, blob.num_saturated) == ("dis", "none", 0)
    for pair in pairs:
        flow = blob.flow(pair.t, pair.gap)
        assert flow.dtype == np.float32 and flow.shape == (2, height, width)
        assert np.abs(flow - pair.flow_px).max() <= 1 / 128
        stored = blob.occlusion(pair.t, pair.gap)
        if pair.occlusion is None:
            assert stored is None
        else:
            np.testing.assert_array_equal(stored, pair.occlusion)
        both = blob.pair(pair.t, pair.gap)
        np.testing.assert_array_equal(both.flow_px, flow)
        assert (both.occlusion is None) == (pair.occlusion is None)


def test_full_range_of_the_fine_scale_survives_the_differences():
    # Neighbours 1024 px apart: their difference does not fit into int16.
    flow = np.empty((2, 4, 50), np.float32)
    flow[..., ::2], flow[..., 1::2] = -512.0, 511.984375
    blob = FlowBlob(encode([FlowPair(0, 1, flow)], 4, 50))
    np.testing.assert_array_equal(blob.flow(0, 1), flow)
    assert blob.num_saturated == 0


def test_saturated_pair_is_stored_coarser_and_counted_and_its_neighbour_is_not():
    calm, wild = smooth_flow(0, 20, 30), smooth_flow(1, 20, 30)
    wild[0, 3, 4], wild[1, 5, 6], wild[0, 7, 8] = 700.26, -1999.9, 5000.0
    blob = FlowBlob(encode([FlowPair(0, 1, calm), FlowPair(1, 1, wild)], 20, 30))
    assert (blob.num_saturated, blob.num_clipped) == (3, 1)
    assert np.abs(blob.flow(0, 1) - calm).max() <= 1 / 128
    decoded = blob.flow(1, 1)
    assert decoded[0, 7, 8] == 32767 / 16
    wild[0, 7, 8] = decoded[0, 7, 8]
    assert np.abs(decoded - wild).max() <= 1 / 32


def test_largest_floats_are_clipped_not_wrapped():
    flow = np.zeros((2, 3, 3), np.float32)
    flow[0, 0, 0], flow[1, 2, 2] = np.finfo(np.float32).max, np.finfo(np.float32).min
    decoded = FlowBlob(encode([FlowPair(0, 1, flow)], 3, 3)).flow(0, 1)
    assert decoded[0, 0, 0] == 32767 / 16 and decoded[1, 2, 2] == -2048.0
    assert np.count_nonzero(decoded) == 2


def test_bytes_do_not_depend_on_order_or_memory_layout():
    pairs = make_pairs()
    strided = [FlowPair(p.t, p.gap, np.asfortranarray(p.flow_px), p.occlusion) for p in reversed(pairs)]
    assert encode(pairs) == encode(strided) == encode(iter(pairs))


@pytest.mark.parametrize("size_known", [True, False])
def test_one_pair_is_read_without_the_others(size_known):
    pairs = make_pairs(120, 160)
    data = encode(pairs, 120, 160)
    reads = []

    def source(offset, size):
        reads.append((offset, size))
        return data[offset : offset + size]

    blob = FlowBlob(source, size=len(data) if size_known else None)
    assert len(reads) == (1 if size_known else 2)
    index_reads = list(reads)
    flow = blob.flow(1, -1)
    assert np.abs(flow - pairs[2].flow_px).max() <= 1 / 128
    assert len(reads) == len(index_reads) + 1
    assert reads[-1][1] < len(data) / 4
    blob.pair(3, 2)
    assert len(reads) == len(index_reads) + 2


@pytest.mark.parametrize(("num_pairs", "reads_of_index"), [(None, 2), (600, 1), (3, 2), (100_000, 1)])
def test_table_longer_than_the_first_read(num_pairs, reads_of_index):
    flow = np.zeros((2, 2, 2), np.float32)
    data = encode([FlowPair(t, 1, flow + t % 500) for t in range(600)], 2, 2, frames=601)
    reads = []

    def source(offset, size):
        reads.append(size)
        return data[offset : offset + size]

    blob = FlowBlob(source, size=len(data), num_pairs=num_pairs)
    assert len(blob.pairs) == 600 and len(reads) == reads_of_index
    assert (blob.flow(599, 1) == 99).all() and (blob.flow(0, 1) == 0).all()


def test_no_pairs_is_a_valid_blob():
    blob = FlowBlob(encode([]))
    assert blob.pairs == [] and blob.num_saturated == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value):
    flow = smooth_flow(0, 37, 53)
    flow[1, 2, 3] = value
    with pytest.raises(ValueError, match="t=2 gap=-1 has 1 values that are not finite"):
        encode([FlowPair(2, -1, flow)])


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (FlowPair(0, 0, np.zeros((2, 37, 53), np.float32)), "not a pair of two frames"),
        (FlowPair(8, 1, np.zeros((2, 37, 53), np.float32)), "not a pair of two frames"),
        (FlowPair(0, -1, np.zeros((2, 37, 53), np.float32)), "not a pair of two frames"),
        (FlowPair(0, 1, np.zeros((2, 53, 37), np.float32)), "has shape"),
        (FlowPair(0, 1, np.zeros((2, 37, 53), np.float32), np.zeros((3, 3), bool)), "occlusion of shape"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(pair, message):
    with pytest.raises(ValueError, match=message):
        encode([pair])


def test_a_pair_given_twice_is_refused():
    pair = FlowPair(0, 1, np.zeros((2, 37, 53), np.float32))
    with pytest.raises(ValueError, match="given twice"):
        encode([pair, pair])


def test_a_missing_pair_is_named_with_what_is_there():
    with pytest.raises(KeyError, match=r"t=4 gap=1; stored: 5 pairs, gaps \[-8, -1, 1, 2\]"):
        FlowBlob(encode(make_pairs())).flow(4, 1)


def test_every_flipped_byte_is_noticed():
    pairs = make_pairs()
    data = encode(pairs)
    rng = np.random.default_rng(0)
    places = [*range(0, 40), *rng.integers(40, len(data), 300).tolist(), len(data) - 1]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(ValueError):
            blob = FlowBlob(bytes(damaged))
            for t, gap in blob.pairs:
                blob.pair(t, gap)


@pytest.mark.parametrize("kept", [0, 10, 31, 32, 100, 500, -1])
def test_a_cut_blob_is_noticed(kept):
    data = encode(make_pairs())[:kept]
    with pytest.raises(ValueError):
        FlowBlob(data)
    with pytest.raises(ValueError):
        blob = FlowBlob(lambda offset, size: data[offset : offset + size])
        for t, gap in blob.pairs:
            blob.pair(t, gap)


def test_other_bytes_are_named():
    with pytest.raises(ValueError, match="not a flow blob"):
        FlowBlob(b"PK\x03\x04" + bytes(100))


def test_uncertainty_comes_back_to_two_per_cent_and_costs_nothing_where_there_is_none():
    rng = np.random.default_rng(5)
    flow = smooth_flow(1, 12, 17)
    sigma = np.exp2(rng.uniform(-8, 7.9, (12, 17))).astype(np.float32)
    pairs = [FlowPair(0, 1, flow, flow[0] > 0, sigma), FlowPair(1, -1, flow)]
    data = encode(pairs, 12, 17)
    blob = FlowBlob(data)
    np.testing.assert_allclose(blob.uncertainty(0, 1), sigma, rtol=0.0219)
    np.testing.assert_array_equal(blob.pair(0, 1).uncertainty_px, blob.uncertainty(0, 1))
    np.testing.assert_array_equal(blob.pair(0, 1).occlusion, flow[0] > 0)
    assert blob.uncertainty(1, -1) is None and blob.pair(1, -1).uncertainty_px is None
    np.testing.assert_array_equal(blob.flow(1, -1), FlowBlob(encode(pairs[1:], 12, 17)).flow(1, -1))
    assert FlowBlob(encode(pairs[1:], 12, 17)).uncertainty(1, -1) is None
    extremes = np.array([[0.0, 1e-9, np.inf, 1e9]], np.float32)
    stored = FlowBlob(encode([FlowPair(0, 1, np.zeros((2, 1, 4), np.float32), None, extremes)], 1, 4)).uncertainty(0, 1)
    np.testing.assert_allclose(stored, [[2**-8, 2**-8, 2**7.9375, 2**7.9375]], rtol=1e-6)


def test_uncertainty_that_is_no_error_is_refused():
    flow = np.zeros((2, 2, 3), np.float32)
    for bad in (np.full((2, 3), -1.0, np.float32), np.full((2, 3), np.nan, np.float32), np.ones((3, 2), np.float32)):
        with pytest.raises(ValueError, match="uncertainty"):
            encode([FlowPair(0, 1, flow, None, bad)], 2, 3)


def test_flow_that_is_not_known_everywhere_comes_back_nan_there():
    rng = np.random.default_rng(5)
    flow = smooth_flow(3, 37, 53)
    valid = rng.random((37, 53)) < 0.2
    partial = np.where(valid, flow, np.float32(np.nan))
    pairs = [FlowPair(0, 1, partial, flow[0] > 0, None, valid), FlowPair(1, -1, flow)]
    blob = FlowBlob(encode(pairs))
    whole = blob.pair(0, 1)
    assert np.array_equal(whole.valid, valid) and np.array_equal(whole.occlusion, flow[0] > 0)
    assert np.array_equal(np.isnan(whole.flow_px), np.isnan(partial))
    assert np.abs(whole.flow_px - flow)[:, valid].max() <= 1 / 128
    assert np.array_equal(blob.flow(0, 1), whole.flow_px, equal_nan=True)
    assert blob.pair(1, -1).valid is None and np.abs(blob.flow(1, -1) - flow).max() <= 1 / 128
    # Validity that leaves nothing out is not stored, and the bytes are those of flow without it.
    assert encode([FlowPair(0, 1, flow, None, None, np.ones((37, 53), bool))]) == encode([FlowPair(0, 1, flow)])


def test_unknown_flow_costs_little_and_a_number_that_is_none_is_refused():
    flow = smooth_flow(3, 37, 53)
    valid = np.zeros((37, 53), bool)
    valid[10:20] = True
    small = encode([FlowPair(0, 1, np.where(valid, flow, np.float32(np.nan)), None, None, valid)])
    assert len(small) < len(encode([FlowPair(0, 1, flow)])) / 2
    with pytest.raises(ValueError, match="not finite"):
        encode([FlowPair(0, 1, np.where(valid, np.float32(np.nan), flow), None, None, valid)])
    with pytest.raises(ValueError, match="validity of shape"):
        encode([FlowPair(0, 1, flow, None, None, valid[1:])])


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 16, 129), (2, 1, 1), (2, 0, 5)])
def test_differences_that_wrap_come_back(shape):
    """Neighbours up to 65535 apart, as no flow has them: sums go around modulo 2^16 as differences did."""
    integers = np.random.default_rng(0).choice(np.array([-32768, 32767, -1, 0, 30000], np.int16), shape)
    np.testing.assert_array_equal(unpack_differences(pack_differences(integers), *shape[1:]), integers)
