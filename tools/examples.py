"""Make the example workflows anew: their .json as the frontend saves them, and a .jpg of each.

    COMFYUI_PATH=... python tools/examples.py [NAME ...]

Starts ComfyUI, puts each workflow together in its page in Chromium, saves what the page would save,
runs it, and takes a picture. Widgets are stored by position: after a change of a node's widgets,
run this. It needs what ``tools/run.py tests`` needs.
"""

import json
import os
import sys
import tempfile
from itertools import count
from math import ceil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.comfyui.conftest import comfyui_path, make_base  # noqa: E402
from tests.comfyui.frontend import QUIET, READY  # noqa: E402
from tests.comfyui.server import Server  # noqa: E402

FOLDER = ROOT / "example_workflows"
VIEW = {"width": 1900, "height": 1100}
SLOW = 240_000  # ms, for a page on a busy machine
SIDE = 200  # of a picture in a thumbnail
# What a node shows below its widgets once it has run, in pixels.
ROOM = {
    "PreviewImage": 300, "FMN_TrainForgetPatch": 330, "FMN_ConceptInversionProbe": 330,
    "FMN_SaveForgetPatch": 70, "FMN_ApplyForgetPatch": 60, "FMN_ApplyGatedPatch": 60,
    "FMN_SafeLatentDiffusion": 60, "FMN_InspectForgetPatch": 250, "FMN_TrainForgetPatches": 150,
    "FMN_MergeForgetPatches": 80,
}  # fmt: skip
LAYOUT = """
([graph, columns, titles, note, room]) => {
  app.loadApiJson(graph, 'example');
  const byId = id => app.graph.getNodeById(id) ?? app.graph.getNodeById(String(id));
  let x = 0;
  for (const column of columns) {
    let y = 0, width = 0;
    for (const id of column) {
      let node;
      if (id === 0) {
        node = LiteGraph.createNode('MarkdownNote');
        app.graph.add(node);
        node.title = 'What this shows';
        node.widgets[0].value = note;
        node.setSize([330, 30 + 24 * Math.ceil(note.length / 42)]);
      } else {
        node = byId(id);
        const size = node.computeSize();
        node.setSize([Math.max(size[0], 310), size[1] + (room[node.type] ?? 0)]);
        node.title = titles[id] ?? node.constructor.title;
        for (const widget of node.widgets ?? [])
          if (widget.name === 'control_after_generate') widget.value = 'fixed';
      }
      node.pos = [x, y];
      y += node.size[1] + 60;
      width = Math.max(width, node.size[0]);
    }
    x += width + 50;
  }
  app.graph.setDirtyCanvas(true, true);
}
"""
FIT = """
() => {
  const nodes = app.graph.nodes;
  const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0]));
  const bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1]));
  const view = app.canvas.canvas.getBoundingClientRect();
  const scale = Math.min((view.width - 120) / right, (view.height - 200) / (bottom + 40), 1);
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [80 / scale, 130 / scale];
  app.canvas.setDirty(true, true);
}
"""


class Workflow:
    """A workflow in API form, with columns of nodes and a note.

    ``add`` gives a node's number; [number, output] is a link to it.
    """

    def __init__(self, note):
        self.note, self.nodes, self.titles, self.columns = note, {}, {}, [[0]]
        self.rows = 2  # of pictures in the thumbnail
        self._numbers = count(1)

    def add(self, kind, title="", /, **inputs):
        number = next(self._numbers)
        linked = {
            name: [str(value[0]), value[1]] if isinstance(value, list) else value
            for name, value in inputs.items()
        }
        self.nodes[str(number)] = {"class_type": kind, "inputs": linked}
        self.columns[-1].append(number)
        if title:
            self.titles[number] = title
        return number

    def column(self):
        self.columns.append([])

    def demo(self):
        return self.add("FMN_LoadDemoCheckpoint")

    def concept(self, name="dog", **inputs):
        return self.add("FMN_Concept", **{"name": name, "kind": "object"} | inputs)

    def text(self, load, text, title="Prompt"):
        return self.add("CLIPTextEncode", title, clip=[load, 1], text=text)

    def latent(self, pictures=2):
        return self.add("EmptyLatentImage", width=128, height=128, batch_size=pictures)

    def train(self, load, concept, method=None, **inputs):
        """Without a method the node takes the default."""
        chosen = {} if method is None else {"method": [method, 0]}
        return self.add(
            "FMN_TrainForgetPatch", model=[load, 0], clip=[load, 1], vae=[load, 2],
            concepts=[concept, 0], **chosen, **inputs,
        )  # fmt: skip

    def apply(self, load, train, **inputs):
        return self.add(
            "FMN_ApplyForgetPatch", model=[load, 0], patch=[train, 0], strength=1.0, **inputs
        )

    def sample(self, title, model, positive, negative, latent, steps=16):
        return self.add(
            "KSampler", title, model=[model, 0], positive=[positive, 0], negative=[negative, 0],
            latent_image=[latent, 0], seed=4, steps=steps, cfg=3.5, sampler_name="euler",
            scheduler="normal", denoise=1.0,
        )  # fmt: skip

    def shown(self, load, drawn):
        """Previews of {title: sampler}: a column of decoders, then columns of pictures."""
        self.column()
        decoded = [
            (title, self.add("VAEDecode", samples=[sampler, 0], vae=[load, 2]))
            for title, sampler in drawn.items()
        ]
        for i, (title, decoder) in enumerate(decoded):
            if i % self.rows == 0:
                self.column()
            self.add("PreviewImage", title, images=[decoder, 0])


def compared(flow, load, prompts, models, steps=16):
    """Draws {title: prompt} with each of {title: model}, from the same noise."""
    empty, latent = flow.text(load, "", "Negative prompt"), flow.latent()
    texts = {title: flow.text(load, text, title) for title, text in prompts.items()}
    drawn, flow.rows = {}, len(models)
    for subject, text in texts.items():
        flow.column()
        for when, model in models.items():
            title = f"{subject}, {when}"
            drawn[title] = flow.sample(title, model, text, empty, latent, steps)
    flow.shown(load, drawn)


def forget_a_concept():
    flow = Workflow(
        "Makes a patch on the small model that comes with the pack, saves it, and draws the same "
        "prompt before and after. No method is connected, so it is the default, "
        "**Re-read**.\n\nFor your own model put *Load Checkpoint* in place of *Load Demo "
        "Checkpoint*, and name your concept."
    )
    load = flow.demo()
    concept = flow.concept(prompts="a dog, noto emoji\na dog, twemoji\n3d render of a dog")
    flow.column()
    train = flow.train(load, concept)
    flow.add("FMN_SaveForgetPatch", patch=[train, 0], filename_prefix="forget_dog")
    flow.add("FMN_InspectForgetPatch", patch=[train, 0])
    flow.column()
    patched = flow.apply(load, train)
    compared(flow, load, {"Dog": "a photo of a dog"}, {"before": load, "after": patched})
    return flow


def uce_and_keep_list():
    flow = Workflow(
        "**UCE** is a closed form: no training, done in a moment. The **keep-list** protects "
        "words: your own, such as close neighbours, and a list that comes along.\n\nThe dog goes, "
        "the cat stays."
    )
    load = flow.demo()
    concept = flow.concept()
    keep = flow.add(
        "FMN_KeepList", concepts=[concept, 0], list="common", words="cat\nrabbit\nbear\na photo"
    )
    flow.column()
    method = flow.add("FMN_MethodUce", tokens="from-last")
    train = flow.train(load, concept, method, keep=[keep, 0])
    flow.add("FMN_SaveForgetPatch", patch=[train, 0], filename_prefix="uce_dog")
    flow.column()
    patched = flow.apply(load, train)
    prompts = {"Dog": "a photo of a dog", "Cat": "a photo of a cat"}
    compared(flow, load, prompts, {"before": load, "after": patched})
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
        "proves nothing: a longer one may succeed. More rounds withstand more, and harm more."
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
    flow.titles[second] = "Round 2: forget what the attack found, too"
    flow.add("FMN_SaveForgetPatch", patch=[second, 0], filename_prefix="repaired_dog")
    flow.column()
    fresh = probe(flow, load, pictures, second, "Attack on round 2")
    flow.column()
    flow.add("PreviewImage", "Untouched", images=[pictures, 0])
    flow.add("PreviewImage", "Round 1, by name", images=[attack, 1])
    flow.column()
    flow.add("PreviewImage", "Round 1, by learned words", images=[attack, 0])
    flow.add("PreviewImage", "Round 2, by learned words", images=[fresh, 0])
    return flow


def safe_latent_diffusion():
    flow = Workflow(
        "**Safe Latent Diffusion** steers sampling away from a concept. No training, no change of "
        "weights; whoever can edit the workflow can take it out.\n\nThe presets are the paper's, "
        "made for 50 steps of Stable Diffusion 1.4."
    )
    load = flow.demo()
    concept = flow.concept("ink drawing", kind="style")
    flow.column()
    safe = flow.add(
        "FMN_SafeLatentDiffusion", model=[load, 0], clip=[load, 1], concepts=[concept, 0],
        preset="max",
    )  # fmt: skip
    flow.column()
    prompts = {"Ink": "a photo of a cat in the style of ink drawing", "Emoji": "a cat, noto emoji"}
    compared(flow, load, prompts, {"before": load, "steered": safe}, steps=50)
    return flow


def gated_patch():
    flow = Workflow(
        "A strong patch harms neighbours. **Apply Gated Patch** lets it through only as far as the "
        "prompt is close to what it forgets: the cat stays as it was.\n\nThe plain Apply node "
        "costs nothing while sampling; this one a little."
    )
    load = flow.demo()
    concept = flow.concept()
    flow.column()
    method = flow.add("FMN_MethodUce", tokens="from-last", keep_list="none")
    train = flow.train(load, concept, method)
    flow.add("FMN_SaveForgetPatch", patch=[train, 0], filename_prefix="strong_dog")
    flow.column()
    plain = flow.apply(load, train)
    gated = flow.add(
        "FMN_ApplyGatedPatch", model=[load, 0], clip=[load, 1], patch=[train, 0], strength=1.0
    )
    prompts = {"Dog": "a photo of a dog", "Cat": "a photo of a cat"}
    compared(flow, load, prompts, {"untouched": load, "plain": plain, "gated": gated})
    return flow


def forget_many():
    flow = Workflow(
        "One patch **for each concept of a list**, as files in `output/forget_patches/batch`. Run "
        "it again with more lines: only new ones are made. **Merge** then makes one patch of all, "
        "no larger than you say.\n\nThe list can also be a file: .txt, .csv, .yaml or .json. See "
        "docs/batch.md."
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
    flow.add("FMN_SaveForgetPatch", patch=[merge, 0], filename_prefix="many")
    flow.add("FMN_InspectForgetPatch", patch=[merge, 0])
    flow.column()
    patched = flow.apply(load, merge)
    prompts = {
        "Dog": "a photo of a dog", "Santa": "a photo of santa claus",
        "Cat": "a photo of a cat, noto emoji",
    }  # fmt: skip
    compared(flow, load, prompts, {"before": load, "after": patched})
    return flow


def correct_a_concept():
    flow = Workflow(
        "Forgetting can mend. The demo model never learned the word *puppy* and draws anything. "
        "**Concept Ablation** teaches it to draw what it draws for the **anchor**, *dog*. UCE "
        "would do so in a moment.\n\nSee docs/correction.md."
    )
    load = flow.demo()
    concept = flow.concept(
        "puppy", kind="custom", anchor="dog",
        prompts="puppy\na puppy, noto emoji\na puppy, blob emoji\na puppy, ink drawing",
    )  # fmt: skip
    flow.column()
    method = flow.add("FMN_MethodAblation", sample_steps=12, guidance=3.5)
    flow.column()
    train = flow.train(load, concept, method)
    flow.add("FMN_SaveForgetPatch", patch=[train, 0], filename_prefix="puppy_is_dog")
    flow.column()
    patched = flow.apply(load, train)
    prompts = {"Puppy": "a photo of a puppy", "Dog": "a photo of a dog"}
    compared(flow, load, prompts, {"before": load, "after": patched})
    return flow


EXAMPLES = {
    "Forget a concept (demo)": forget_a_concept,
    "Forget with UCE and a keep-list (demo)": uce_and_keep_list,
    "Erase and repair, attack rounds (demo)": erase_and_repair,
    "Safe Latent Diffusion (demo)": safe_latent_diffusion,
    "Gated patch (demo)": gated_patch,
    "Correct a concept (demo)": correct_a_concept,
    "Forget many concepts (demo)": forget_many,
}


def make(page, server, name, flow):
    """Write the .json and the .jpg of one example."""
    titles = {str(number): title for number, title in flow.titles.items()}
    page.evaluate(LAYOUT, [flow.nodes, flow.columns, titles, flow.note, ROOM])
    page.evaluate(FIT)
    page.wait_for_timeout(500)
    saved = json.loads(page.evaluate("JSON.stringify(app.graph.serialize())"))
    (FOLDER / f"{name}.json").write_text(json.dumps(saved) + "\n", encoding="utf-8")
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    outputs = server.run(prompt)
    previews = {
        node["title"]: outputs[str(node["id"])]
        for node in saved["nodes"]
        if node["type"] == "PreviewImage"
    }
    pictures = {title: server.image(output) for title, output in previews.items()}
    thumbnail(pictures, flow.rows).save(FOLDER / f"{name}.jpg", quality=88)


def thumbnail(pictures, rows):
    """The first picture of every preview with its title, column by column."""
    columns, font = ceil(len(pictures) / rows), ImageFont.load_default(14)
    sheet = Image.new("RGB", (columns * (SIDE + 8) + 8, rows * (SIDE + 30) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, pixels) in enumerate(pictures.items()):
        left, top = 8 + i // rows * (SIDE + 8), i % rows * (SIDE + 30)
        draw.text((left, top + 8), title, "black", font=font)
        picture = Image.fromarray((pixels * 255).round().astype("uint8"))
        sheet.paste(picture.resize((SIDE, SIDE)), (left, top + 30))
    return sheet


def main(names):
    unknown = [name for name in names if name not in EXAMPLES]
    if unknown:
        sys.exit(f"There is no example '{unknown[0]}': use {', '.join(EXAMPLES)}.")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        base = make_base(Path(folder) / "base")
        with Server(comfyui_path(), base) as server:
            browser = playwright.chromium.launch(
                executable_path=os.environ.get("CHROMIUM_PATH") or None, args=QUIET
            )
            page = browser.new_page(viewport=VIEW)
            page.set_default_timeout(SLOW)
            page.route(
                "**/*",
                lambda route: (
                    route.continue_()
                    if route.request.url.startswith((server.url, "data:", "blob:"))
                    else route.abort()
                ),
            )
            page.goto(server.url, wait_until="domcontentloaded")
            page.wait_for_function(READY)
            for name in names or EXAMPLES:
                make(page, server, name, EXAMPLES[name]())
                print(name, flush=True)
            browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
