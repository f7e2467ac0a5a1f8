"""Small networks fitted on frozen features."""
