"""What differs between models in training: the protocol, and one recipe per model."""
