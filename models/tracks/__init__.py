"""Point trackers."""
