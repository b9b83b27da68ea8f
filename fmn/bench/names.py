"""Names of what can be measured; apart, as the command line's help needs nothing else."""

# What a run measures unless told otherwise takes minutes; the rest takes hours.
QUICK = ("pictures", "rungs")
TEXT = ("rungs", "inversion", "ring_a_bell")
BEYOND = ("completion", "noise", "classifier", "inpainting", "relearn")
MEASURES = ("pictures", "together", "mscore", *TEXT, *BEYOND)
SCALE = ("many", "sequence")
UNTOUCHED = "untouched"
