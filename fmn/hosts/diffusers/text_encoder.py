"""The text encoders of a diffusers pipeline, for methods that look inside or learn words."""

from contextlib import ExitStack, contextmanager, nullcontext

import torch

from ...concepts.concept import Prompt
from ...models.interface import Text, tokenize_with_placeholders, two_encoders_error
from ...models.token_positions import CHUNK, word_positions


@contextmanager
def borrow_text_encoder(model, words=True):
    """``Model.borrow_text_encoder`` of a ``DiffusersModel``."""
    if words and model.family.vector_dim is not None:
        raise two_encoders_error(model.family)
    names = ("text_encoder", "text_encoder_2")[: len(model.family.texts)]
    encoders = [getattr(model.pipeline, name) for name in names]
    with frozen(encoders):
        yield _TextEncoder(model, encoders)


@contextmanager
def frozen(modules):
    """Modules with frozen weights and out of training mode, where autograd works, for a while."""
    flags = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.requires_grad_(False).train(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, was_training in zip(modules, training):
            module.train(was_training)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def shortened(pipeline, length):
    """The text encoders compute the first ``length`` of 77 tokens alone, for a while."""
    parts = (getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2"))

    def cut(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        if mask is not None:
            kwargs = kwargs | {"attention_mask": mask[:, :length]}
        return (args[0][:, :length], *args[1:]), kwargs

    with ExitStack() as hooks:
        for part in parts:
            if part is not None and length < CHUNK:
                hooks.enter_context(part.register_forward_pre_hook(cut, with_kwargs=True))
        yield


class _TextEncoder:
    def __init__(self, model, encoders):
        self.model, self.encoder, self.pair = model, encoders[0], len(encoders) > 1
        self.encoders = encoders
        self.embedding = self.encoder.get_input_embeddings()
        self.width = self.embedding.weight.shape[1]

    @property
    def device(self):
        return self.encoder.device

    def module(self, name):
        return self.model.text_module(name)

    def _ids(self, text):
        return self.model.tokenize(Prompt(text, text))

    def vectors(self, words):
        if self.pair:
            raise two_encoders_error(self.model.family)
        ids = self._ids(words)
        found = [ids[position] for position in word_positions(ids)]
        return self.embedding.weight[found].detach().float().clone()

    def ids_of(self, texts):
        pipeline = self.model.pipeline
        tokenizers = [pipeline.tokenizer, *([pipeline.tokenizer_2] if self.pair else [])]
        for text in texts:
            self._ids(text)  # refuses what is too long
        options = {"padding": "max_length", "max_length": CHUNK, "return_tensors": "pt"}
        found = [tokenizer(list(texts), **options).input_ids for tokenizer in tokenizers]
        return torch.stack(found, 1)

    def encode_ids(self, ids):
        found = [
            encoder(part.to(encoder.device), output_hidden_states=self.pair)
            for encoder, part in zip(self.encoders, ids.unbind(1))
        ]
        if not self.pair:
            return Text(found[0].last_hidden_state.float())
        # As SDXL reads them: both last but one states, and the second's projected pooled text.
        context = torch.cat([each.hidden_states[-2] for each in found], -1)
        return Text(context.float(), {"pooled": found[1].text_embeds.float()})

    def encode(self, prompt, vectors=None):
        if self.pair and vectors is not None:
            raise two_encoders_error(self.model.family)
        ids = tokenize_with_placeholders(self._ids, prompt, 0 if vectors is None else len(vectors))
        if self.pair:
            context, _, pooled, _ = self.model.pipeline.encode_prompt(
                prompt=prompt,
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
            return Text(context.float(), {"pooled": pooled.float()}), pooled.float()
        held = [i for i, token in enumerate(ids) if token is None]
        # Any word serves below the vectors; the encoder finds its first EOT by the ids.
        known = torch.tensor([[0 if token is None else token for token in ids]])

        def put_in(module, args, output):
            rows = vectors.repeat(len(held) // len(vectors), 1).to(output)
            return output.index_copy(1, torch.tensor(held, device=output.device), rows[None])

        with self.embedding.register_forward_hook(put_in) if held else nullcontext():
            output = self.encoder(known.to(self.encoder.device))
        return Text(output.last_hidden_state.float()), output.pooler_output.float()
