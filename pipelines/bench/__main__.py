"""`python -m kinema.pipelines.bench [NAME ...]`: run benchmarks and print their ratio tables."""

from __future__ import annotations

import importlib
import os
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from kinema.configs.json_text import json_text
from kinema.pipelines.bench.paired import print_rows

BENCHMARKS = {
    "shard": "clips artifact against plain copying and a plain re-encode of the sources; clip.codec=copy",
    "flow_codec": "flow sidecar against fp16 npz, KITTI's PNG and plain fp16",
    "rendered_flow": "rendered pairs with exact flow, pairs per second of one core against the 50 asked for",
    "loader": "groups of pictures by ranged reads against decoding each clip from its start",
    "stream_loader": "stream mode against random mode and plain WebDataset, from a bucket that answers after 30 ms",
    "teacher": "RAFT, RAFT-small and SEA-RAFT M against the plain pairwise networks; memory at 1080p",
    "tracker": "CoTracker3 on a clip of 24 frames against the plain network",
    "flow_networks": "a pair of frames through RAFT, SEA-RAFT, WAFT and AllTracker: processor time and memory",
    "train_step": "FlowFeat step with stored flow against the same step with RAFT inside",
    "fpt_loader": "one and several samples per opened clip against one per MPEG-1 file decoded from its start",
    "clip_size": "bytes of clips by setting at the PSNR of MPEG-1, with what they cost to encode and to read",
    "fpt_sampling": "joint samples and predictions of the Flow Poke Transformer against the published way",
    "fpt_step": "Flow Poke Transformer step against the same model with a dense boolean mask",
    "dismo_loader": "frames of several samples per opened clip against one decode per sample from the clip's start",
    "search": "a million motion embeddings: exact search in blocks against all at once, and an index against it",
    "local_correlation": "local correlation and its gradients on the CPU against unfolding the windows",
    "cosine_attention": "attention of pokes and queries on the CPU against a dense boolean mask",
    "correlation_lookup": "windows formed on demand against the all-pairs volume",
}


def main(names: Sequence[str]) -> int:
    """Run the named benchmarks (all without names); one table each, then one JSON line with all rows."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.stderr.write(f"benchmark {unknown[0]!r} is not known; choose from {', '.join(BENCHMARKS)}\n")
        return 2
    threads = torch.get_num_threads()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {threads} torch threads, torch {torch.__version__}")
    everything: dict[str, list[dict[str, Any]]] = {}
    for name in names or BENCHMARKS:
        started = time.monotonic()
        rows = importlib.import_module(f"kinema.pipelines.bench.{name}").run()
        torch.set_num_threads(threads)
        print(f"\n{name}: {BENCHMARKS[name]} ({time.monotonic() - started:.0f} s)")
        print_rows(rows)
        everything[name] = rows
    print("\n" + json_text(everything))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
