"""Flow between any two pictures, without artifacts."""

import kinema
from kinema.pipelines.pictures import write_png
from kinema.pipelines.pictures.motion import arrows_picture

first, second = kinema.open("clips")[0].frames([0, 2])
flow = kinema.predict_flow(first, second, kinema.load_model("dis"))
print(f"flow {flow.shape}, up to {abs(flow).max():.1f} px")
write_png("03_flow_between_two_pictures.png", arrows_picture(first, flow))
