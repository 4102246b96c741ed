"""Kernels in C++ for CPUs, compiled on the machine on which they run."""

from .library import load

__all__ = ['load']
