"""Image encoders and the dense decoder on top of them."""
