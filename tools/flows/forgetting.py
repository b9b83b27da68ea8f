"""Workflows that forget: one concept, many, or to mend."""

from .workflow import Workflow


def forget_a_concept():
    flow = Workflow(
        "Makes a patch on the small model that comes with the pack, saves it, and draws the same "
        "prompt before and after. No method is connected, so it is the default, "
        "**Re-read**.\n\n**Something else?** Change `name` in *Concept to Forget*, the "
        "prompts in `forgotten` and `kept`, and `filename_prefix` in *Save Forget Patch*. For "
        "your own model put *Load Checkpoint* in place of *Load Demo Checkpoint*."
    )
    load = flow.demo()
    concept = flow.concept()
    flow.column()
    compared, shown = _compared(flow, load, flow.train(load, concept), "forget_dog", *DOG)
    prompts = [(compared, "forgotten"), (compared, "kept")]
    flow.app([(concept, "name"), (concept, "kind"), *prompts], [shown])
    return flow


def forget_in_a_transformer():
    flow = Workflow(
        "The same in a **diffusion transformer**, a small one shaped like Flux.1. Re-read records "
        "what its attention layers read and solves for the patch: no gradients, and 8-bit weights "
        "are fine. The patch is a LoRA that *Load LoRA* reads too.\n\n**Your own model?** Put the "
        "nodes that load Flux, Z-Image, Qwen-Image ... in place of *Load Demo Checkpoint*. Change "
        "`name` in *Concept to Forget*, the prompts in `forgotten` and `kept`, and "
        "`filename_prefix` in *Save Forget Patch*."
    )
    load = flow.demo("transformer")
    concept = flow.concept()
    flow.column()
    _compared(flow, load, flow.train(load, concept), "forget_dog_transformer", *DOG)
    return flow


DOG = ["a photo of a dog", "a dog, 3d render"], ["a photo of a cat", "a horse, twemoji"]


def _compared(flow, load, patch, file, forgotten, kept):
    """Shows prompts before and after, and saves the patch with the first two pictures."""
    flow.column()
    compared = flow.compare(load, "", forgotten, kept, patch=[patch, 0])
    flow.save(patch, file, thumbnail=[compared, 2])
    flow.column()
    flow.room["PreviewImage"] = 600
    return compared, flow.show(compared)


def _with_keep_list(note, concept, keep, method, file, *prompts):
    """Forgets a concept and keeps some words; draws prompts before and after.

    Args:
        concept, keep: inputs of those nodes. method: kind of the node, and its inputs, or None.
        file: what the patch is saved as. prompts: those to forget, and those to keep.
    """
    flow = Workflow(note)
    load = flow.demo()
    named = flow.concept(**concept)
    kept = flow.add("FMN_KeepList", concepts=[named, 0], **keep)
    flow.column()
    chosen = method and flow.add(method[0], **method[1])
    _compared(flow, load, flow.train(load, named, chosen, keep=[kept, 0]), file, *prompts)
    return flow


def forget_a_person():
    return _with_keep_list(
        "An **identity**: a person or a character. The method is the default, **Re-read**. The "
        "**keep-list** names those who look most alike; the list *people* adds more.\n\n"
        "Look at the neighbours, not only at who is gone.\n\n**Somebody else?** Change "
        "`name` in *Concept to Forget*, `words` in *Keep List* to those who look alike (without "
        "the new name), the prompts in `forgotten` and `kept`, and `filename_prefix` in *Save "
        "Forget Patch*.",
        {"name": "vampire", "kind": "identity"},
        {"list": "people", "words": "zombie\nsuperhero\nwizard"},
        None,
        "forget_vampire",
        ["a photo of a vampire", "a vampire, noto emoji"],
        ["a photo of a zombie", "a wizard, twemoji", "a superhero, 3d render"],
    )  # fmt: skip


def forget_an_object():
    return _with_keep_list(
        "An **object**, with an **anchor**: what to draw instead. An alias names the same thing in "
        "other words, and is forgotten too. The method is **TRCE**, a closed form on the "
        "token that sums up a prompt.\n\n**Something else?** Change `name`, `aliases` and `anchor` "
        "in *Concept to Forget* (the last two may be empty), `words` in *Keep List* to its "
        "neighbours (without the new name), the prompts in `forgotten` and `kept`, and "
        "`filename_prefix` in *Save "
        "Forget Patch*.",
        {"name": "guitar", "aliases": "acoustic guitar", "anchor": "tree"},
        {"list": "common", "words": "violin\ntrumpet\ndrum"},
        ("FMN_MethodTrce", {}),
        "forget_guitar",
        ["a photo of a guitar", "a guitar, noto emoji"],
        ["a trumpet, noto emoji", "a drum, 3d render", "a hammer, twemoji"],
    )  # fmt: skip


def forget_a_style():
    return _with_keep_list(
        "A **style**: kind *style* trains with 'a photo in the style of ...'. Other styles must "
        "stay, and so must the things drawn in this one. So the **keep-list** names other styles, "
        "and the list *styles* adds more.\n\n**Another style?** Change `name` in *Concept to "
        "Forget*, `words` in *Keep List* to other styles (without the new name), the prompts in "
        "`forgotten` and `kept`, and `filename_prefix` in *Save Forget Patch*.",
        {"name": "ink drawing", "kind": "style"},
        {"list": "styles", "words": "blueprint\nneon sign\nblack silhouette\ntwemoji"},
        None,
        "forget_ink_drawing",
        ["a photo of a teapot in the style of ink drawing", "a castle, ink drawing"],
        ["a teapot, blueprint", "a teapot, neon sign", "a castle, black silhouette"],
    )  # fmt: skip


def uce_and_keep_list():
    return _with_keep_list(
        "**UCE** is a closed form: no training, done in a moment. The **keep-list** protects "
        "your own words, such as close neighbours, and those of the list *common*.\n\nThe dog "
        "goes, the cat stays.\n\n**Something else?** Change `name` in *Concept to Forget*, "
        "`words` in *Keep List* to its neighbours (without the new name), the prompts in "
        "`forgotten` and `kept`, and `filename_prefix` in *Save Forget Patch*.",
        {},
        {"list": "common", "words": "cat\nrabbit\nbear\na photo"},
        ("FMN_MethodUce", {"tokens": "from-last"}),
        "uce_dog",
        *DOG,
    )


def forget_many():
    flow = Workflow(
        "One patch **for each concept of a list**, as files in `output/forget_patches/batch`. Run "
        "it again with more lines: only new ones are made. **Merge** then makes one patch of all, "
        "no larger than you say.\n\nThe list can also be a file: .txt, .csv, .yaml or .json. See "
        "docs/batch.md.\n\n**Other things?** Change the lines in *Concepts to Forget (List)*, the "
        "prompts in `forgotten` and `kept`, and `filename_prefix` in *Save Forget Patch*."
    )
    load = flow.demo()
    concepts = flow.add(
        "FMN_ConceptList", kind="object", file="none",
        text="dog | puppy\nidentity:santa claus\nstyle:ink drawing",
    )  # fmt: skip
    flow.column()
    method = flow.add("FMN_MethodUce", tokens="from-last")
    batch = flow.add(
        "FMN_TrainForgetPatches", model=[load, 0], clip=[load, 1], concepts=[concepts, 0],
        method=[method, 0], folder="batch",
    )  # fmt: skip
    flow.column()
    merge = flow.add(
        "FMN_MergeForgetPatches", how="joint", budget_kb=60, strength=1.0, files="",
        patches=[batch, 0], model=[load, 0], clip=[load, 1], preserve=10.0,
    )  # fmt: skip
    _compared(
        flow, load, merge, "many", ["a photo of a dog", "a photo of santa claus"],
        ["a cat, noto emoji", "a wizard, twemoji"],
    )  # fmt: skip
    return flow


def correct_a_concept():
    flow = Workflow(
        "The same methods can correct a model. The demo model never learned the word *puppy* and "
        "draws anything. **Concept Ablation** teaches it to draw what it draws for the **anchor**, "
        "*dog*. UCE does so in a moment.\n\nSee docs/correction.md.\n\n**Another word?** Change "
        "`name` and `anchor` in *Concept to Forget*, and write the new word into each line of its "
        "`prompts`. Then change the prompts in `forgotten` and `kept`, and `filename_prefix` in "
        "*Save Forget Patch*."
    )
    flow.room["FMN_TrainForgetPatch"] = 600  # curve, text and maps
    load = flow.demo()
    concept = flow.concept(
        "puppy", kind="custom", anchor="dog",
        prompts="puppy\na puppy, noto emoji\na puppy, blob emoji\na puppy, ink drawing",
    )  # fmt: skip
    flow.column()
    method = flow.add("FMN_MethodAblation", sample_steps=12, guidance=3.5)
    flow.column()
    train = flow.train(load, concept, method)
    _compared(
        flow, load, train, "puppy_is_dog", ["a photo of a puppy", "a puppy, noto emoji"],
        ["a photo of a dog", "a cat, noto emoji"],
    )  # fmt: skip
    return flow
