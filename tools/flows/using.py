"""Workflows that use patches, guide without one, and attack."""

from .workflow import Workflow

DOG = ["a photo of a dog", "a dog, noto emoji"], ["a cat, noto emoji", "a horse, twemoji"]


def downloaded_patch():
    flow = Workflow(
        "A patch that somebody gave you is a file. Put it in `models/forget_patches`, press *R*, "
        "and choose it in **Load Forget Patch**. The one chosen here comes with the pack.\n\nThe "
        "file is checked when it is loaded. **Inspect** shows what it says about itself, which "
        "proves nothing: look at pictures. A patch for another family of models is refused.\n\n"
        "**Another patch?** Choose it in `file`, and write its concept into `forgotten` "
        "in both *Compare* nodes."
    )
    load = flow.demo()
    patch = flow.add("FMN_LoadForgetPatch", file="demo/santa_claus.safetensors")
    flow.column()
    flow.add("FMN_InspectForgetPatch", patch=[patch, 0])
    half = flow.apply(load, patch, "Apply Forget Patch, half", 0.5)
    flow.column()
    prompts = ["a photo of santa claus"], ["a photo of an astronaut"]
    whole = flow.compare(load, "Compare, at 1", *prompts, patch=[patch, 0])
    some = flow.compare(load, "Compare, at 0.5", *prompts, after=[half, 0])
    flow.column()
    shown = flow.show(whole, "At strength 1")
    flow.show(some, "At strength 0.5")
    flow.app([(patch, "file"), (whole, "forgotten"), (whole, "kept")], [shown])
    return flow


def gated_patch():
    flow = Workflow(
        "A strong patch harms neighbours. **Apply Gated Patch** lets it through only as far as the "
        "prompt is close to what it forgets: the cat stays as it was.\n\nThe plain Apply node "
        "costs nothing while sampling; this one a little.\n\n**Something else?** Change `name` in "
        "*Concept to Forget*, `forgotten` and `kept`, and `filename_prefix` in *Save Forget Patch*."
    )
    load = flow.demo()
    concept = flow.concept()
    flow.column()
    method = flow.add("FMN_MethodUce", tokens="from-last", keep_list="none")
    train = flow.train(load, concept, method)
    flow.column()
    gated = flow.add(
        "FMN_ApplyGatedPatch", model=[load, 0], clip=[load, 1], patch=[train, 0], strength=1.0
    )
    prompts = ["a photo of a dog"], ["a photo of a cat"]
    plain = flow.compare(load, "Compare, plain", *prompts, patch=[train, 0])
    lets = flow.compare(load, "Compare, gated", *prompts, after=[gated, 0])
    flow.save(train, "strong_dog", thumbnail=[plain, 2])
    flow.column()
    flow.show(plain, "Plain")
    flow.show(lets, "Gated")
    return flow


def safe_latent_diffusion():
    flow = Workflow(
        "**Safe Latent Diffusion** steers sampling away from a text. No training, no change of "
        "weights; whoever can edit the workflow can take it out.\n\nIt only steers *away*: "
        "where the dogs were, little is left that can be recognised. Now and then a dog comes "
        "through, and kept pictures change a little.\n\nThe presets are the paper's, made for 50 "
        "steps of Stable Diffusion 1.4. *max* also damages what should stay.\n\n**Something "
        "else?** Change `text` in *Safe Latent Diffusion*, and the prompts in `forgotten` and "
        "`kept`."
    )
    load = flow.demo()
    flow.column()
    safe = flow.add(
        "FMN_SafeLatentDiffusion", model=[load, 0], clip=[load, 1], text="dog", preset="strong"
    )
    flow.column()
    compared = flow.compare(load, "", *DOG, after=[safe, 0], steps=50)
    flow.column()
    flow.show(compared)
    return flow


def probe(flow, load, pictures, train, title):
    return flow.add(
        "FMN_ConceptInversionProbe", title, model=[load, 0], clip=[load, 1], vae=[load, 2],
        images=[pictures, 0], words="dog", patch=[train, 0], strength=1.0, pictures=4, tokens=1,
        steps=40,
    )  # fmt: skip


def erase_and_repair():
    flow = Workflow(
        "A patch by **RECE** is **attacked**: the probe learns a made-up word that still brings "
        "the dog back. In a second round that word is forgotten along with the name, and the new "
        "patch is attacked afresh.\n\nCompare what the learned words draw. An attack that fails "
        "proves nothing: a longer one may succeed. More rounds withstand more, and harm more.\n\n"
        "**Something else?** Change `name` in both *Concept to Forget*, `words` in both attacks, "
        "the prompt, and `filename_prefix` in *Save Forget Patch*."
    )
    load = flow.demo()
    concept = flow.concept()
    text, empty = flow.text(load, "a photo of a dog"), flow.text(load, "", "Negative prompt")
    latent = flow.latent(4)
    flow.column()
    method = flow.add("FMN_MethodRece", rounds=3, tokens="all")
    sampler = flow.sample("What the untouched model draws", load, text, empty, latent)
    pictures = flow.add("VAEDecode", samples=[sampler, 0], vae=[load, 2])
    flow.column()
    first = flow.train(load, concept, method)
    flow.titles[first] = "Round 1: forget the name"
    attack = probe(flow, load, pictures, first, "Attack on round 1")
    flow.column()
    again = flow.concept(learned=[attack, 3])
    second = flow.train(load, again, method)
    flow.titles[second] = "Round 2: what was found"
    flow.column()
    fresh = probe(flow, load, pictures, second, "Attack on round 2")
    flow.column()
    flow.add("PreviewImage", "Untouched", images=[pictures, 0])
    flow.add("PreviewImage", "Round 1, by learned words", images=[attack, 0])
    flow.column()
    flow.add("PreviewImage", "Round 2, by learned words", images=[fresh, 0])
    flow.save(second, "repaired_dog", thumbnail=[fresh, 1])
    return flow
