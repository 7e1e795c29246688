"""The Triton backend: the launcher, which imports no Triton, and the kernels, which the first launch imports."""
