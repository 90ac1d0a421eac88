"""`python -m trt_kernels` prints the report."""

from .report import report

print(report())
