"""Data sets with known flow as shards: clips without loss, and their flow beside them."""
