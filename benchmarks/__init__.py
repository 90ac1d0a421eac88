"""Benchmarks of trt_kernels; README.md says how to run and read them."""
