"""`read_sample` functions of the loader tests, in a module that loader workers can import."""

import torch

from kinema.pipelines.loader import Skip


def read_pair(clip, rng):
    """A random stored pair: frame t, its flow, and a random number."""
    pairs = clip.flow_pairs
    t, gap = pairs[rng.integers(len(pairs))]
    return {
        "frame": torch.from_numpy(clip.frames([t])[0]),
        "flow": clip.flow(t, gap),
        "t": t,
        "noise": float(rng.standard_normal()),
        "name": f"{t}{gap:+d}",
    }


def skip_some(clip, rng):
    """Like `read_pair`, but a third of the draws is skipped, and two clips always are."""
    if clip.key[0] in "0123":
        return Skip("still")
    if rng.uniform() < 0.33:
        return Skip("constant flow")
    return read_pair(clip, rng)


def skip_some_together(clip, rngs):
    """`skip_some` for several draws of a clip."""
    return [skip_some(clip, rng) for rng in rngs]
