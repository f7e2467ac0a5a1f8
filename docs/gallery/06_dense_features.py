"""Features of every pixel, their three main components as colours."""

import torch

import kinema
from kinema.pipelines.pictures import feature_pca, panel, write_png

model = kinema.load_model("run")
image = kinema.open("clips")[1].frames([0])[0]
y_enc, y_dec = kinema.predict_features(image, model, short_side=image.shape[0])
print(f"y_enc {y_enc.shape}, y_dec {y_dec.shape}")
write_png("06_dense_features.png", panel([image, feature_pca(torch.from_numpy(y_dec))], columns=2))
