"""Names of the measures; a module of its own, as the command line's help needs nothing else."""

# The default takes minutes; all of them take hours. "rungs" are prompts at several levels, from
# the bare name to a paraphrase; the name stands in commands and stores.
QUICK = ("pictures", "rungs")
TEXT = ("rungs", "inversion", "ring_a_bell")
BEYOND = ("completion", "noise", "classifier", "inpainting", "relearn")
MEASURES = ("pictures", "together", "mscore", *TEXT, *BEYOND)
SCALE = ("many", "sequence")
# The others ask for a U-Net's noise schedule or CLIP's tokens.
ANY_MODEL = ("pictures", "together", "mscore", "rungs", "inversion", "completion", "noise")
UNTOUCHED = "untouched"
