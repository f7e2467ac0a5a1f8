"""Training of the Flow Poke Transformer."""
