"""The shards are plain WebDataset: any reader of tar files will do."""

import io
import json

import kinema
from kinema.pipelines.pictures import panel, write_png
from kinema.pipelines.video.decode import VideoFile
from kinema.pipelines.video.packets import to_rgb

pictures = []
for sample in kinema.open("clips").to_webdataset():
    about = json.loads(sample["json"])
    with VideoFile(io.BytesIO(sample["mp4"])) as video:
        pictures.append(to_rgb(next(iter(video.frames()))))
    print(sample["__key__"], about["source"], about["num_frames"], "frames")
write_png("10_webdataset.png", panel(pictures[:6], columns=3))
