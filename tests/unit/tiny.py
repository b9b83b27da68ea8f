"""A host small enough for exact tests, whose text has one token a word, and patches."""

import zlib
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fmn.concepts.concept import Concept, Prompt
from fmn.models.families import DEMO, UNetFamily, cross_attention_names, layers
from fmn.models.interface import Text, fingerprint
from fmn.models.sampling import DDPMSchedule
from fmn.models.token_positions import CHUNK, EOS_ID, tokenize_with_placeholders, word_positions
from fmn.patches.metadata import new_info
from fmn.patches.patch import ForgetPatch

BOS = 49406
TINY = UNetFamily(
    key="tiny", title="Tiny test model", channels=(8, 16), blocks=1, depth=(1, 1), middle_depth=1,
    context_dim=12, linear_projection=False, resolution=64, architecture="stable-diffusion-v1",
    base_version="sd_v1", texts=(),
)  # fmt: skip
TINY_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,  # diffusers means the number of heads
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}


def tiny_unet(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**TINY_CONFIG)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".attn2.to_q" in name or ".attn2.to_k" in name:
                parameter *= 3  # attention that prefers some tokens, as a trained model's
    return unet.eval()


def make_scheduler():
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def word_id(word):
    return 0 if word == "!" else 320 + zlib.crc32(word.encode()) % 40000


def sections(words, pad=EOS_ID):
    """Ids of words in sections of 77: BOS, at most 75 words, EOT, padding."""
    ids = []
    for start in range(0, max(len(words), 1), CHUNK - 2):
        part = [BOS, *words[start : start + CHUNK - 2], EOS_ID]
        ids += part + [pad] * (CHUNK - len(part))
    return ids


class TinyModel:
    """A ``Model`` over ``tiny_unet``. ``seen`` collects what the U-Net was given."""

    family = TINY
    prediction = "epsilon"

    def __init__(self, pad=EOS_ID, seed=0):
        self.unet, self.pad = tiny_unet(seed), pad
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(EOS_ID + 1, TINY.context_dim, generator=generator)
        self.position = torch.randn(CHUNK, TINY.context_dim, generator=generator)
        self.seen = []
        self.poisoned = False  # attention is NaN

    def tokenize(self, prompt):
        return sections([word_id(word) for word in prompt.text.split()], self.pad)

    def encode(self, prompt):
        ids = self.tokenize(prompt)
        position = self.position.repeat(len(ids) // CHUNK, 1)
        return Text((self.embedding[torch.tensor(ids)] + position)[None])

    def encode_all(self, texts, length=CHUNK):
        return torch.cat([self.encode(Prompt(text, text)).context for text in texts])[:, :length]

    def sample(self, prompt, seeds, size, steps, guidance):
        shape = 4, size // 8, size // 8
        generators = [torch.Generator().manual_seed(100 + seed) for seed in seeds]
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    def encode_images(self, images, size):
        means = images.mean((1, 2, 3)).view(-1, 1, 1, 1)
        return means.expand(-1, 4, size // 8, size // 8).clone()

    def decode(self, latents):
        grey = (latents.mean((1, 2, 3), keepdim=True) / 4 + 0.5).clamp(0, 1)
        return grey.expand(-1, latents.shape[2] * 8, latents.shape[3] * 8, 3)

    @contextmanager
    def borrow_text_encoder(self, words=True):
        with torch.enable_grad():
            yield TinyTextEncoder(self)

    def fingerprint(self):
        return fingerprint(TINY, lambda layer: self.unet.get_submodule(layer.name).weight)

    @contextmanager
    def borrow_denoiser(self):
        flags = [(parameter, parameter.requires_grad) for parameter in self.unet.parameters()]
        try:
            self.unet.requires_grad_(False)
            yield TinyDenoiser(self)
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    quantised = False

    def watch(self, batch=1, side=8):
        return self.borrow_denoiser()


class TinyDenoiser:
    device = torch.device("cpu")
    context_argument = "encoder_hidden_states"

    def __init__(self, model):
        self.model = model
        self.alphas_cumprod = make_scheduler().alphas_cumprod
        self.schedule = DDPMSchedule(self.alphas_cumprod)

    def module(self, name):
        return self.model.unet.get_submodule(name)

    def weight(self, name):
        return self.module(name).weight.detach()

    def cross_attention_modules(self):
        return [self.module(name) for name in cross_attention_names(TINY)]

    def predict_noise(self, x_t, t, text):
        self.model.seen.append((x_t, t, text))
        context = text.context * torch.nan if self.model.poisoned else text.context
        dtype = self.model.unet.dtype
        return self.model.unet(x_t.to(dtype), t, context.to(dtype)).sample

    def checkpoint_blocks(self):
        names = "ResnetBlock2D", "BasicTransformerBlock"
        return [module for module in self.model.unet.modules() if type(module).__name__ in names]


class TinyTextEncoder:
    """One token a word; the pooled text is the mean of the words' states."""

    width = TINY.context_dim

    def __init__(self, model):
        self.model = model

    def _ids(self, text):
        return self.model.tokenize(Prompt(text, text))

    def vectors(self, words):
        ids = self._ids(words)
        return self.model.embedding[[ids[position] for position in word_positions(ids)]].clone()

    def ids_of(self, texts):
        return torch.tensor([[self._ids(text)] for text in texts])

    def encode_ids(self, ids):
        rows = self.model.embedding[ids[:, 0]] + self.model.position[: ids.shape[2]]
        return Text(rows)

    def encode(self, prompt, vectors=None):
        ids = tokenize_with_placeholders(self._ids, prompt, 0 if vectors is None else len(vectors))
        held = iter([] if vectors is None else vectors.repeat(CHUNK // len(vectors), 1))
        rows = [next(held) if token is None else self.model.embedding[token] for token in ids]
        states = torch.stack(rows) + self.model.position
        words = word_positions([BOS if token is None else token for token in ids])
        return Text(states[None]), states[words].mean(0, keepdim=True)


class Cancelled(BaseException):
    """As ComfyUI's interrupt, it is no ValueError or the like."""


def traces(unet):
    """Names of modules with what a run may leave behind: hooks and replaced forwards."""
    return [
        name
        for name, module in unet.named_modules()
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    ]


def weights_of(unet):
    return {name: value.clone() for name, value in unet.state_dict().items()}


def same_tensors(first, second):
    """Bit by bit, NaN included."""
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype
        and first[key].shape == second[key].shape
        and first[key].contiguous().flatten().view(torch.uint8).equal(
            second[key].contiguous().flatten().view(torch.uint8)
        )
        for key in first
    )  # fmt: skip


def random_changes(family, rank, scope=lambda layer: layer.is_key_or_value, seed=0, size=0.01):
    """Layer name -> random (up, down), as ``ForgetPatch.changes`` has them."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for layer in layers(family):
        if scope(layer):
            out, *inputs = layer.shape
            up = torch.randn(out, rank, *[1] * (len(inputs) - 1), generator=generator)
            down = torch.randn(rank, *inputs, generator=generator)
            changes[layer.name] = up * size, down
    return changes


def make_patch(family=DEMO, prediction="epsilon", rank=2, concepts=None, **options):
    """A patch with random factors; ``options`` are those of ``random_changes``."""
    concepts = concepts or [Concept("dog", aliases=("puppy",)), Concept("van gogh", "style")]
    model = SimpleNamespace(prediction=prediction)
    settings = {"steps": 35, "lr": 1e-3}
    info = new_info(model, "f" * 32, "resteer", settings, concepts, [2.0, 1.0], 0)
    return ForgetPatch(family, random_changes(family, rank, **options), info)


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path, change):
    """Save the file again after ``change(tensors, metadata)``."""
    tensors, metadata = load_file(path), metadata_of(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    return path
