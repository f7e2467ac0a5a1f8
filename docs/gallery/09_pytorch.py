"""Clips as a PyTorch data set."""

import torch

import kinema
from kinema.pipelines.pictures import flow_picture, panel, write_png

dataset = kinema.open("clips", flow="flow/dis").to_torch(frames_per_clip=2)
batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=3)))
print({name: tuple(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)})
frames = [frame.numpy() for clip in batch["frames"] for frame in clip]
flows = [flow_picture(flow) for flow in batch["flow_px"]]
write_png("09_pytorch.png", panel([*frames, *flows], columns=3))
