"""The native library: CPU and CUDA kernels behind the ops, and why it cannot be used where it cannot."""
