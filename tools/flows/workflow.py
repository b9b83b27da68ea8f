"""A workflow put together from parts, before the frontend has seen it."""

from itertools import count


class Workflow:
    """A workflow in API form, with columns of nodes and a note.

    ``add`` gives a node's number; [number, output] is a link to it.
    """

    def __init__(self, note):
        self.note = note.replace("`", "**")  # newer pages draw code blue, on a note's brown
        self.nodes, self.titles, self.columns = {}, {}, [[0]]
        self.rows, self.height = 1, 400  # of pictures in the thumbnail, and of each in pixels
        self.enclosed, self.promoted = [], []
        self.form = {}  # what App mode shows of it
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

    def app(self, widgets, shown):
        """Choose the form of ComfyUI's App mode: pairs of a node and a widget's name, and the nodes
        whose pictures it shows."""
        self.form = {"inputs": [list(pair) for pair in widgets], "outputs": shown}

    def demo(self, network="U-Net"):
        return self.add("FMN_LoadDemoCheckpoint", network=network)

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

    def compare(self, load, title="", forgotten=(), kept=(), **inputs):
        """The prompts before and after what ``inputs`` link: a patch, or a model and a CLIP."""
        inputs = {"pictures": 1, "first_seed": 4} | inputs
        return self.add(
            "FMN_CompareBeforeAfter", title, model=[load, 0], clip=[load, 1], vae=[load, 2],
            forgotten="\n".join(forgotten), kept="\n".join(kept), **inputs,
        )  # fmt: skip

    def show(self, compared, title="Before and after"):
        """The grid of a comparison, large."""
        number = self.add("PreviewImage", title, images=[compared, 0])
        self.widths[number] = 640
        return number

    def save(self, patch, prefix, **thumbnail):
        """``thumbnail``: [node, output] of pictures, if there are any."""
        self.add("FMN_SaveForgetPatch", patch=[patch, 0], filename_prefix=prefix, **thumbnail)
