"""A teacher's flow, stored once: one pair is one ranged read."""

import torch

import kinema
from kinema.pipelines.pictures import flow_picture, panel, write_png

done = kinema.teach(clips="clips", teacher="dis", gaps=[1, 2])
clips = kinema.open("clips", flow="flow/dis")
print(f"{done.pairs} pairs, {done.mean_flow_px:.2f} px on average")
rows = [(clip.frames([4])[0], flow_picture(torch.from_numpy(clip.flow(4, 2)))) for clip in clips]
write_png("02_teacher_flow.png", panel([picture for row in rows[:4] for picture in row], columns=4))
