"""Points followed through a clip, by chaining stored flow."""

import kinema
from kinema.pipelines.pictures import write_png
from kinema.pipelines.pictures.motion import track_trails

kinema.teach(clips="clips", teacher="dis", out="both_ways", gaps=[1, 2], directions=["forward", "backward"])
done = kinema.track(clips="clips", flow="both_ways", out="tracks")
clip = kinema.open("clips", tracks="tracks")[0]
tracks = clip.tracks()
print(f"{done.tracks} tracks; {tracks.visible.mean():.0%} of the first clip's points are seen")
every_fifth = tracks.points_px[:, ::5], tracks.visible[:, ::5]
*_, last = track_trails(clip.frames(range(clip.num_frames)), *every_fifth)
write_png("04_point_tracks.png", last)
