"""The loss head in Triton (impl="triton"), for CUDA devices and for Triton's interpreter.

In go the rows that count and the options of ..contract, out come its Evaluation and RowStatistics.
fused.py tells the plan; only modules with kernels import triton, when they are first run.
"""

from .fused import evaluate, statistics, why_not

__all__ = ["evaluate", "statistics", "why_not"]
