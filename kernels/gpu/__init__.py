"""`make gpu`: check and time the kernels on a CUDA device, within minutes, on a machine that has only torch and triton."""
