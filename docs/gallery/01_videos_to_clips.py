"""Videos become clips; a clip's frames are an array."""

import kinema
from kinema.pipelines.pictures import panel, write_png
from kinema.pipelines.scenes import render_demo_videos

render_demo_videos("videos", height=96, width=128, num_frames=24)
done = kinema.shard(videos="videos", out="clips", clip={"seconds": 1.0, "preset": "veryfast"})
clips = kinema.open("clips")
print(f"{done.clips} clips of {done.sources} videos; the first has {clips[0].num_frames} frames")
write_png("01_videos_to_clips.png", panel([f for clip in clips for f in clip.frames([0, 3, 5, 7])][:12], columns=4))
