"""ComfyUI's text encoders, to look inside and to learn words; weights that autograd accepts."""

import inspect
from contextlib import ExitStack, contextmanager

import comfy.model_management
import comfy.utils
import torch

from ...concepts.concept import Prompt
from ...errors import ForgetError
from ...models.interface import Text, two_encoders_error
from ...models.token_positions import CHUNK, EOS_ID, tokenize_with_placeholders, word_positions

FLOATS = torch.float32, torch.float16, torch.bfloat16
# What the tokenizer calls a part, and what the encoder does.
ENCODERS = {"l": "clip_l", "h": "clip_h", "g": "clip_g"}


def _is_paged(patcher):
    """Whether ComfyUI moves the weights in and out while they are used, as on GPUs from 0.16 on."""
    return "disable_dynamic" in inspect.signature(patcher.clone).parameters and patcher.is_dynamic()


def plain_clone(patcher):
    """A clone that autograd can work with; of paged weights that is a copy, read from the file."""
    if not _is_paged(patcher):
        return patcher.clone()
    try:
        return patcher.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise ForgetError(
            f"ComfyUI cannot make a trainable copy of this model ({error}): load it with the "
            "stock checkpoint loader."
        ) from error


def plain_clip(clip):
    """The CLIP, or one with a copy of its text encoders if their weights are paged."""
    if not _is_paged(clip.patcher):
        return clip
    plain = clip.clone()
    plain.patcher = plain_clone(clip.patcher)
    plain.cond_stage_model = plain.patcher.model
    return plain


def load_whole(patcher, beside=0):
    """Load all of a model, with its LoRAs in the weights, whatever memory ComfyUI finds free.

    Args:
        beside: bytes that work on it will take; other models make room for them.
    """
    comfy.model_management.load_models_gpu([patcher], memory_required=beside, force_full_load=True)
    if patcher.model.model_lowvram:  # --novram counts for more than force_full_load
        patcher.partially_load(patcher.load_device, 1e32)


def bring_back(patcher, device, beside=0):
    """``load_whole`` again, if ComfyUI has moved the model or a part of it since.

    Of a part that is away the weights are those of the file: ComfyUI then adds LoRAs while a layer
    runs, so whoever reads a weight has to ask for this first.

    Args:
        device: where the model was.
    """
    if patcher.model.device != device or patcher.model.model_lowvram:
        load_whole(patcher, beside)
        leave_inference_mode(patcher.model)  # ComfyUI loads in it


@contextmanager
def borrow_text_encoder(host):
    """``Model.borrow_text_encoder`` of a ``ComfyModel`` that has a CLIP."""
    patcher = host.clip.patcher
    load_whole(patcher)
    with frozen(patcher.model):
        text_encoder = _TextEncoder(host)
        with _copied_inputs(text_encoder.stage):
            yield text_encoder


@contextmanager
def frozen(model):
    """A loaded model out of inference mode and with frozen weights, for a while."""
    with torch.inference_mode(False), torch.enable_grad():
        leave_inference_mode(model)
        flags = [(p, p.requires_grad) for p in model.parameters() if p.requires_grad]
        try:
            model.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            comfy.model_management.soft_empty_cache()


def leave_inference_mode(model):
    """Replace weights and buffers that were made in inference mode by equal ones that were not.

    Autograd refuses the former even as constants. Values do not change; one weight at a time is
    held twice.
    """
    # Names, not a list of pairs: that would keep every old weight alive to the end.
    for name in [name for name, _ in model.named_parameters()]:
        parameter = comfy.utils.get_attr(model, name)
        if parameter.is_inference():
            flag = parameter.requires_grad
            comfy.utils.set_attr_param(model, name, parameter.detach().clone())
            comfy.utils.get_attr(model, name).requires_grad_(flag)
    for name in [name for name, _ in model.named_buffers()]:
        buffer = comfy.utils.get_attr(model, name)
        if buffer.is_inference():
            comfy.utils.set_attr(model, name, buffer.clone())


@contextmanager
def _copied_inputs(encoder):
    """ComfyUI adds to hidden states in place, and backward needs what the norms have read."""

    def cloned(module, args):
        return args[0].clone(), *args[1:]

    with ExitStack() as hooks:
        for module in encoder.modules():
            if isinstance(module, torch.nn.LayerNorm):
                hooks.enter_context(module.register_forward_pre_hook(cloned))
        yield


@contextmanager
def shortened(stage, length):
    """CLIP encoders compute the first ``length`` of 77 tokens alone, for a while."""

    def cut(module, args, kwargs):
        mask = kwargs["mask"]
        return (args[0][:, :length], *args[1:]), kwargs | {"mask": mask[..., :length, :length]}

    with ExitStack() as hooks:
        for module in stage.modules():
            if type(module).__name__ == "CLIPEncoder" and length < CHUNK:
                hooks.enter_context(module.register_forward_pre_hook(cut, with_kwargs=True))
        yield


class _TextEncoder:
    def __init__(self, host):
        self.host, self.clip, self.stage = host, host.clip, host.clip.cond_stage_model
        sections = self.clip.tokenize("", disable_weights=True)
        names = [encoder.comfy for encoder in host.family.texts]
        found = {ENCODERS.get(key) for key in sections}
        if found != set(names) or not all(hasattr(self.stage, name) for name in names):
            raise ForgetError(
                f"This CLIP gives tokens for {', '.join(sections)}, but {host.family.title} has "
                f"the text encoder {' and '.join(names)}: connect the CLIP of the same checkpoint."
            )
        self.pair = len(names) > 1
        self.encoders = [getattr(self.stage, name) for name in names]
        self.encoder = self.encoders[0]
        self.keys = [next(k for k in sections if ENCODERS[k] == name) for name in names]
        self.key = self.keys[0]
        self.width = _checked(self._embedding()).weight.shape[1]
        self.at, self.hooked = self.clip.patcher.model.device, False

    @property
    def device(self):
        return self._embedding().weight.device

    def module(self, name):
        self._back()
        self.hooked = True
        return _checked(self.host.text_module(name))

    def _back(self):
        bring_back(self.clip.patcher, self.at)

    def _embedding(self):
        return self.encoder.transformer.get_input_embeddings()

    def _ids(self, text):
        ids = self.host.tokenize(Prompt(text, text))
        if None in ids:
            raise ForgetError(
                f"The text '{text:.60}' uses an embedding file: write it with words alone."
            )
        return ids

    def vectors(self, words):
        if self.pair:
            raise two_encoders_error(self.host.family)
        ids = self._ids(words)
        found = [ids[position] for position in word_positions(ids)]
        return self._embedding().weight[found].detach().float().cpu().clone()

    def encode(self, prompt, vectors=None):
        if self.pair and vectors is not None:
            raise two_encoders_error(self.host.family)
        ids = tokenize_with_placeholders(self._ids, prompt, 0 if vectors is None else len(vectors))
        if self.pair:
            tokens = self.clip.tokenize(prompt, disable_weights=True)
            with self._ready(projected=True):
                context, pooled = self.stage.encode_token_weights(tokens)[:2]
            return Text(context.float(), {"pooled": pooled.float()}), pooled.float()
        held, section = 0, []
        for token in ids:
            if token is None:
                token = vectors[held % len(vectors)]
                held += 1
            section.append((token, 1.0))
        with self._ready():
            context, pooled = self.stage.encode_token_weights({self.key: [section]})[:2]
        return Text(context.float()), pooled.float()

    def ids_of(self, texts):
        rows = []
        for text in texts:
            self._ids(text)
            tokens = self.clip.tokenize(text, disable_weights=True)
            if any(len(sections) > 1 for sections in tokens.values()):
                raise ForgetError(f"'{text:.60}...' is too long: shorten it to 75 tokens.")
            rows.append([[token for token, *_ in tokens[key][0]] for key in self.keys])
        return torch.tensor(rows)

    def encode_ids(self, ids):
        length = ids.shape[2]
        # ComfyUI adds all 77 position embeddings, so the cut comes behind them.
        whole = torch.nn.functional.pad(ids, (0, CHUNK - length), value=EOS_ID)
        with self._ready(projected=self.pair), shortened(self.stage, length):
            found = [
                encoder.encode(part.tolist())
                for encoder, part in zip(self.encoders, whole.unbind(1))
            ]
        context = torch.cat([context for context, *_ in found], -1).float()
        return Text(context, {"pooled": found[-1][1].float()} if self.pair else {})

    @contextmanager
    def _ready(self, projected=False):
        """Set up as ``CLIP.encode_from_tokens`` does.

        Args:
            projected: the pooled text, as the encoders choose; False: never.
        """
        # ComfyUI may have moved the encoder since, and does so in inference mode. Whoever hooks it
        # goes on with what it put out before, where it was. Others take it from anywhere; to bring
        # it back for them would drive the U-Net out in each step of hardening.
        if self.hooked:
            self._back()
        leave_inference_mode(self.stage)
        self.stage.reset_clip_options()
        if self.clip.layer_idx is not None:
            self.stage.set_clip_options({"layer": self.clip.layer_idx})
        if not projected:
            self.stage.set_clip_options({"projected_pooled": False})
        try:
            yield
        finally:
            self.stage.reset_clip_options()


def _checked(module):
    """The module, if its weights are plain numbers."""
    weight = module.weight
    if weight.dtype not in FLOATS or type(weight) is not torch.nn.Parameter:
        kind = str(weight.dtype).removeprefix("torch.")
        raise ForgetError(
            f"The CLIP's weights are quantised ({kind}): load it in float16, bfloat16 or float32 "
            "to work on it."
        )
    return module
