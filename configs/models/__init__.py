"""Settings of each model's training, one file a model."""
