"""The M-Score of the target, as ``fmn.metrics.mscore`` defines it."""
