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
        self.widths = {}  # {number: pixels} of nodes that are wider than usual
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

    def sample(self, title, model, positive, negative, latent, steps=16):
        return self.add(
            "KSampler", title, model=[model, 0], positive=[positive, 0], negative=[negative, 0],
            latent_image=[latent, 0], seed=4, steps=steps, cfg=3.5, sampler_name="euler",
            scheduler="normal", denoise=1.0,
        )  # fmt: skip

    def stitch(self, pictures, direction, title=""):
        """The node that gives [node, output] of all pictures as one."""
        whole, *rest = pictures
        for picture in rest:
            number = self.add(
                "ImageStitch", title, image1=whole, image2=picture, direction=direction,
                match_image_size=True, spacing_width=4, spacing_color="white",
            )  # fmt: skip
            whole = [number, 0]
        return whole

    def pair(self, before, after):
        """The first picture of each [node, output], side by side: what fits into a patch list."""
        both = self.stitch([before, after], "right", "Before and after")
        first = self.add("ImageFromBatch", "The first pair", image=both, batch_index=0, length=1)
        return [first, 0]

    def save(self, patch, prefix, **thumbnail):
        """``thumbnail``: [node, output] of pictures, if there are any."""
        self.add("FMN_SaveForgetPatch", patch=[patch, 0], filename_prefix=prefix, **thumbnail)


def compared(flow, load, prompts, models, steps=16, saved=None):
    """Draws {title: prompt} with each of {title: model}, from the same noise.

    Args:
        saved: (patch, prefix of its file), to save with the first prompt's pictures.

    Returns:
        {(prompt's title, model's title): [node, output] of the pictures}.
    """
    empty, latent = flow.text(load, "", "Negative prompt"), flow.latent()
    texts = {title: flow.text(load, text, title) for title, text in prompts.items()}
    decoded, flow.rows = {}, len(models)
    for subject, text in texts.items():
        flow.column()
        for when, model in models.items():
            sampler = flow.sample(f"{subject}, {when}", model, text, empty, latent, steps)
            decoder = flow.add("VAEDecode", samples=[sampler, 0], vae=[load, 2])
            decoded[subject, when] = [decoder, 0]
        shown = saved and subject == next(iter(prompts))
        if shown:
            first, *_, last = models
            thumbnail = flow.pair(decoded[subject, first], decoded[subject, last])
        flow.column()
        for when in models:
            flow.add("PreviewImage", f"{subject}, {when}", images=decoded[subject, when])
        if shown:
            flow.save(*saved, thumbnail=thumbnail)
    return decoded
