"""The loss head in C++ (impl="native"), for CPUs: fp32 and bf16.

In go the rows that count and the options of ..contract, out come its Evaluation and RowStatistics.
sweeps.py calls the library of csrc/ twice, row_terms.py is what happens in between.
"""

from .sweeps import evaluate, statistics, why_not

__all__ = ["evaluate", "statistics", "why_not"]
