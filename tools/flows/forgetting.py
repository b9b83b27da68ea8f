"""Workflows that forget: one concept, many, or to mend."""

from .workflow import Workflow, compared


def forget_a_concept():
    flow = Workflow(
        "Makes a patch on the small model that comes with the pack, saves it, and draws the same "
        "prompt before and after. No method is connected, so it is the default, "
        "**Re-read**.\n\n**Something else?** Change `name` in *Concept to Forget*, the prompt in "
        "*Dog*, and `filename_prefix` in *Save Forget Patch*. For your own model put *Load "
        "Checkpoint* in place of *Load Demo Checkpoint*."
    )
    load = flow.demo()
    concept = flow.concept()
    flow.column()
    train = flow.train(load, concept)
    flow.column()
    patched = flow.apply(load, train)
    flow.add("FMN_InspectForgetPatch", patch=[train, 0])
    prompts, models = {"Dog": "a photo of a dog"}, {"before": load, "after": patched}
    compared(flow, load, prompts, models, saved=(train, "forget_dog"))
    return flow


def _with_keep_list(note, concept, keep, method, file, prompts):
    """Forgets a concept and keeps some words; draws prompts before and after.

    Args:
        concept, keep: inputs of those nodes. method: kind of the node, and its inputs.
        file: what the patch is saved as.
    """
    flow = Workflow(note)
    load = flow.demo()
    named = flow.concept(**concept)
    kept = flow.add("FMN_KeepList", concepts=[named, 0], **keep)
    flow.column()
    kind, settings = method
    train = flow.train(load, named, flow.add(kind, **settings), keep=[kept, 0])
    flow.column()
    patched = flow.apply(load, train)
    compared(flow, load, prompts, {"before": load, "after": patched}, saved=(train, file))
    return flow


def forget_a_person():
    return _with_keep_list(
        "An **identity**: a person or a character. The method is **Re-read**, which is the default "
        "too. The **keep-list** names those who look most alike first; a list of people comes "
        "along.\n\nLook at the neighbours, not only at who is gone.\n\n**Somebody else?** Change "
        "`name` in *Concept to Forget*, `words` in *Keep List* to those who look alike (without "
        "the new name), the three prompts, and `filename_prefix` in *Save Forget Patch*.",
        {"name": "vampire", "kind": "identity"},
        {"list": "people", "words": "zombie\nsuperhero\nwizard"},
        ("FMN_MethodReread", {}),
        "forget_vampire",
        {
            "Vampire": "a photo of a vampire", "Zombie": "a photo of a zombie",
            "Wizard": "a wizard, twemoji",
        },
    )  # fmt: skip


def forget_an_object():
    return _with_keep_list(
        "An **object**, with an **anchor**: what is to be drawn instead. An alias names the same "
        "thing in other words, and is forgotten too. The method is **TRCE**, a closed form on the "
        "token that sums up a prompt.\n\n**Something else?** Change `name`, `aliases` and `anchor` "
        "in *Concept to Forget* (the last two may be empty), `words` in *Keep List* to its "
        "neighbours (without the new name), the three prompts, and `filename_prefix` in *Save "
        "Forget Patch*.",
        {"name": "guitar", "aliases": "acoustic guitar", "anchor": "tree"},
        {"list": "common", "words": "violin\ntrumpet\ndrum"},
        ("FMN_MethodTrce", {}),
        "forget_guitar",
        {
            "Guitar": "a photo of a guitar", "Violin": "a photo of a violin",
            "Trumpet": "a trumpet, noto emoji",
        },
    )  # fmt: skip


def forget_a_style():
    return _with_keep_list(
        "A **style**: kind *style* trains with 'a photo in the style of ...'. The things it drew "
        "and the other styles shall stay, so the **keep-list** names those styles, and a list of "
        "styles comes along.\n\n**Another style?** Change `name` in *Concept to Forget*, `words` "
        "in *Keep List* to other styles (without the new name), the three prompts, and "
        "`filename_prefix` in *Save Forget Patch*.",
        {"name": "ink drawing", "kind": "style"},
        {"list": "styles", "words": "blueprint\nneon sign\nblack silhouette\ntwemoji"},
        ("FMN_MethodReread", {}),
        "forget_ink_drawing",
        {
            "Ink drawing": "a photo of a teapot in the style of ink drawing",
            "Blueprint": "a teapot, blueprint", "Neon sign": "a teapot, neon sign",
        },
    )  # fmt: skip


def uce_and_keep_list():
    return _with_keep_list(
        "**UCE** is a closed form: no training, done in a moment. The **keep-list** protects "
        "words: your own, such as close neighbours, and a list that comes along.\n\nThe dog goes, "
        "the cat stays.\n\n**Something else?** Change `name` in *Concept to Forget*, `words` in "
        "*Keep List* to its neighbours (without the new name), the two prompts, and "
        "`filename_prefix` in *Save Forget Patch*.",
        {},
        {"list": "common", "words": "cat\nrabbit\nbear\na photo"},
        ("FMN_MethodUce", {"tokens": "from-last"}),
        "uce_dog",
        {"Dog": "a photo of a dog", "Cat": "a photo of a cat"},
    )


def forget_many():
    flow = Workflow(
        "One patch **for each concept of a list**, as files in `output/forget_patches/batch`. Run "
        "it again with more lines: only new ones are made. **Merge** then makes one patch of all, "
        "no larger than you say.\n\nThe list can also be a file: .txt, .csv, .yaml or .json. See "
        "docs/batch.md.\n\n**Other things?** Change the lines in *Concepts to Forget (List)*, the "
        "three prompts, and `filename_prefix` in *Save Forget Patch*."
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
    flow.add("FMN_InspectForgetPatch", patch=[merge, 0])
    flow.column()
    patched = flow.apply(load, merge)
    prompts = {
        "Dog": "a photo of a dog", "Santa": "a photo of santa claus",
        "Cat": "a photo of a cat, noto emoji",
    }  # fmt: skip
    models = {"before": load, "after": patched}
    compared(flow, load, prompts, models, saved=(merge, "many"))
    return flow


def correct_a_concept():
    flow = Workflow(
        "Forgetting can mend. The demo model never learned the word *puppy* and draws anything. "
        "**Concept Ablation** teaches it to draw what it draws for the **anchor**, *dog*. UCE "
        "would do so in a moment.\n\nSee docs/correction.md.\n\n**Another word?** Change `name` "
        "and `anchor` in *Concept to Forget*, and write the new word into each line of its "
        "`prompts`. Then change the two prompts, and `filename_prefix` in *Save Forget Patch*."
    )
    flow.room = {"FMN_TrainForgetPatch": 600}  # curve, text and maps
    load = flow.demo()
    concept = flow.concept(
        "puppy", kind="custom", anchor="dog",
        prompts="puppy\na puppy, noto emoji\na puppy, blob emoji\na puppy, ink drawing",
    )  # fmt: skip
    flow.column()
    method = flow.add("FMN_MethodAblation", sample_steps=12, guidance=3.5)
    flow.column()
    train = flow.train(load, concept, method)
    flow.column()
    patched = flow.apply(load, train)
    prompts = {"Puppy": "a photo of a puppy", "Dog": "a photo of a dog"}
    models = {"before": load, "after": patched}
    compared(flow, load, prompts, models, saved=(train, "puppy_is_dog"))
    return flow
