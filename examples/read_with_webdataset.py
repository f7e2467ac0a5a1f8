"""Frames, flow and tracks of stored clips through plain WebDataset, batched by a PyTorch loader.

python examples/read_with_webdataset.py CLIPS FLOW [TRACKS]
"""

import sys

import torch
import webdataset as wds

from kinema.pipelines.loader.webdataset import decoders, shard_urls, with_sidecars


def first_pair(sample):
    """A frame, the next one, and the flow between them."""
    frames = torch.from_numpy(sample["mp4"][:2]).permute(0, 3, 1, 2)
    flow = torch.from_numpy(sample["flow"].flow(0, 1))
    return {"key": sample["__key__"], "image1": frames[0], "image2": frames[1], "flow_px": flow}


def main(clips, *sidecars):
    """Print the size and the mean motion of every clip's first pair."""
    dataset = wds.DataPipeline(
        wds.SimpleShardList(shard_urls(clips)),
        wds.split_by_node,
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        with_sidecars(*sidecars),
        wds.decode(*decoders(frames=slice(0, 2))),
        wds.map(first_pair),
    )
    for pair in torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=0):
        motion = pair["flow_px"].norm(dim=0).mean()
        print(pair["key"], tuple(pair["image1"].shape), f"{motion:.2f} px", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
