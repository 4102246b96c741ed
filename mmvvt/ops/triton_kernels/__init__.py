"""Triton kernels. Nothing here is imported before a kernel is to run."""
