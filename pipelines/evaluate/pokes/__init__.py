"""How well a Flow Poke Transformer knows what moves where."""
