"""Motion transfer: an adapter through which a video transformer follows motion embeddings."""
