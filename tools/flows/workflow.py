"""A workflow put together from parts, before the frontend has seen it."""

from itertools import count


class Workflow:
    """A workflow in API form, with columns of nodes and a note.

    ``add`` gives a node's number; [number, output] is a link to it.
    """

    def __init__(self, note):
        self.note, self.nodes, self.titles, self.columns = note, {}, {}, [[0]]
        self.rows, self.height = 2, 200  # of pictures in the thumbnail, and of each in pixels
        self.enclosed, self.promoted = [], []
        self.room = {}  # {type of node: pixels} below its widgets, where it shows more than usual
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

    def enclose(self, numbers, widgets):
        """Name the nodes of a blueprint, and its widgets: pairs of a node and a widget's name."""
        self.enclosed, self.promoted = numbers, widgets

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

    def apply(self, load, train, title="", strength=1.0, **inputs):
        return self.add(
            "FMN_ApplyForgetPatch", title, model=[load, 0], patch=[train, 0], strength=strength,
            **inputs,
        )  # fmt: skip

    def save(self, patch, prefix):
        return self.add("FMN_SaveForgetPatch", patch=[patch, 0], filename_prefix=prefix)

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
