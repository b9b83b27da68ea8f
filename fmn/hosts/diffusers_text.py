"""The text encoder of a diffusers pipeline, for learning input embeddings."""

from contextlib import contextmanager

import torch

from ..concept import Prompt
from ..errors import ForgetError
from ..model import Text, spelled
from ..spans import word_positions


@contextmanager
def borrow_text(model):
    """``Model.borrow_text`` of a ``DiffusersModel``.

    Raises:
        ForgetError: the model has two text encoders.
    """
    if model.family.vector_dim is not None:
        raise ForgetError(
            f"{model.family.title} has two text encoders, whose words cannot be learned yet: use "
            "a Stable Diffusion 1.x or 2.x model."
        )
    encoder = model.pipeline.text_encoder
    flags = [(parameter, parameter.requires_grad) for parameter in encoder.parameters()]
    training = encoder.training
    try:
        encoder.requires_grad_(False).train(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield _BorrowedText(model, encoder)
    finally:
        encoder.train(training)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class _BorrowedText:
    def __init__(self, model, encoder):
        self.model, self.encoder = model, encoder
        self.embedding = encoder.get_input_embeddings()
        self.width = self.embedding.weight.shape[1]

    def _ids(self, text):
        return self.model.tokenize(Prompt(text, text))

    def vectors(self, words):
        ids = self._ids(words)
        found = [ids[position] for position in word_positions(ids)]
        return self.embedding.weight[found].detach().float().clone()

    def encode_ids(self, ids):
        return self.encoder(ids.to(self.encoder.device)).last_hidden_state.float()

    def encode(self, prompt, vectors=None):
        ids = spelled(self._ids, prompt, 0 if vectors is None else len(vectors))
        held = [i for i, token in enumerate(ids) if token is None]
        # Any word serves below the vectors; the encoder finds its first EOT by the ids.
        known = torch.tensor([[0 if token is None else token for token in ids]])

        def put_in(module, args, output):
            rows = vectors.repeat(len(held) // len(vectors), 1).to(output)
            return output.index_copy(1, torch.tensor(held, device=output.device), rows[None])

        hook = self.embedding.register_forward_hook(put_in) if held else None
        try:
            output = self.encoder(known.to(self.encoder.device))
        finally:
            if hook:
                hook.remove()
        return Text(output.last_hidden_state.float()), output.pooler_output.float()
