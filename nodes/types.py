"""Socket types of the pack."""

from comfy_api.latest import io

CATEGORY = "forget-me-not"
Concepts = io.Custom("FMN_CONCEPT")  # list[fmn.concepts.concept.Concept]
Method = io.Custom("FMN_METHOD")  # fmn.settings.Settings of a method
Options = io.Custom("FMN_OPTIONS")  # nodes.train.OptionWidgets
Keep = io.Custom("FMN_KEEP")  # tuple[str, ...] of words and prompts
Learned = io.Custom("FMN_EMBEDDING")  # fmn.patches.embedding_file.Embedding
Patch = io.Custom("FORGET_PATCH")  # fmn.patches.patch.ForgetPatch
Patches = io.Custom("FMN_PATCHES")  # list[PatchAndStrength]
