"""DAVIS video object segmentation: folder, protocols, official measures."""
