"""`make gpu`: check and time the kernels on a CUDA device within minutes; python3, torch and triton are enough."""
