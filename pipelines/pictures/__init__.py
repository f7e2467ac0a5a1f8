"""Pictures and films of images, flow, features and tracks."""

from kinema.pipelines.pictures.images import (
    feature_pca,
    flow_picture,
    image_picture,
    normalise_images,
    panel,
    size_for_model,
    write_png,
)

__all__ = [
    "feature_pca",
    "flow_picture",
    "image_picture",
    "normalise_images",
    "panel",
    "size_for_model",
    "write_png",
]
