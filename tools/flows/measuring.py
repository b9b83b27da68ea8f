"""Workflows that compare methods, and that measure a patch."""

from .workflow import Workflow


def compare_methods():
    flow = Workflow(
        "One concept by two methods at the same seeds: the default, **Re-read**, and **UCE**.\n\n"
        "To compare others, put another Method node in the place of UCE. A few pictures are a "
        "first look; *Measure a patch* goes on from there.\n\n**Something else?** Change `name` "
        "in *Concept to Forget*, and `forgotten` and `kept` in both *Compare* nodes."
    )
    load = flow.demo()
    concept = flow.concept()
    method = flow.add("FMN_MethodUce")
    flow.column()
    trains = {"Re-read": flow.train(load, concept), "UCE": flow.train(load, concept, method)}
    flow.titles |= {train: f"Train by {name}" for name, train in trains.items()}
    flow.column()
    prompts = ["a photo of a dog", "a dog, twemoji"], ["a photo of a cat", "a horse, 3d render"]
    shown = {
        name: flow.compare(load, f"Compare, {name}", *prompts, patch=[train, 0])
        for name, train in trains.items()
    }
    flow.column()
    for name, compared in shown.items():
        flow.show(compared, name)
    return flow


WIDE = 900  # pixels, of what shows a strip of pictures


def measure_a_patch():
    flow = Workflow(
        "Three looks at one patch.\n\n**ConceptBench** lets a judge say what pictures show: is the "
        "dog gone (UA), are its neighbours (IRA) and styles (CRA) still there? The report is in "
        "`output/forget_bench/dog`. Four pictures a question are few; take 12 or more.\n\n"
        "**M-Score** measures whether words learned from pictures of dogs still mean *dog*. "
        "**Attention Map** shows where the word *dog* is read in a picture that the model draws of "
        "it. Its share may even rise a little after forgetting: Re-read changes what is read "
        "there, not how much.\n\n**Something else?** Change `name` in *Concept to Forget* to "
        "another target of the suite, such as apple, car or guitar, and `name` in *ConceptBench*, "
        "which is the report's folder."
    )
    flow.rows, flow.height = 4, 180
    load = flow.demo()
    concept = flow.concept()
    flow.column()
    train = flow.train(load, concept)
    patched = flow.apply(load, train)
    flow.column()
    bench = flow.add(
        "FMN_ConceptBench", model=[load, 0], clip=[load, 1], vae=[load, 2], patch=[train, 0],
        suite="demo", targets="", measure="pictures", count=4, name="dog", write_scores=False,
    )  # fmt: skip
    score = flow.add(
        "FMN_MScore", model=[patched, 0], clip=[load, 1], vae=[load, 2], concepts=[concept, 0],
        untouched=[load, 0], templates="", inversions=2, steps=40, pictures=4,
    )  # fmt: skip
    flow.column()
    looked = {
        when: flow.add(
            "FMN_AttentionMap", f"Attention Map, {when}", model=[model, 0], clip=[load, 1],
            vae=[load, 2], concepts=[concept, 0], references="samples", picture_seed=0,
            brightest=0.0,
        )
        for when, model in {"before": load, "after": patched}.items()
    }  # fmt: skip
    flow.column()
    shown = [flow.add("PreviewImage", "Bench", images=[bench, 1])]
    shown.append(flow.add("PreviewImage", "M-Score", images=[score, 1]))
    for when, looker in looked.items():
        shown.append(flow.add("PreviewImage", f"Attention, {when}", images=[looker, 0]))
    flow.widths = dict.fromkeys(shown, WIDE)
    flow.room = {"PreviewImage": 200}
    return flow
