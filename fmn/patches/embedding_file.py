"""Learned tokens as a file: a textual-inversion embedding that other programs read too.

One float32 tensor [tokens, width] named ``emb_params``, as common trainers name it. ComfyUI, A1111
and diffusers take a file's only tensor whatever its name is.
"""

import json
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import __version__
from ..errors import ForgetError
from ..files import write_whole

FORMAT = "1"
KEY = "emb_params"
MAX_BYTES = 4 << 20  # of a file; 64 tokens of the widest encoder take 0.3 MB
MAX_TOKENS = 64
FLOATS = "F16", "BF16", "F32"
INFO_TYPES = {
    "what": str, "method": str, "settings": dict, "base.family": str, "base.fingerprint": str,
    "loss": dict, "date": str, "version": str,
}  # fmt: skip


@dataclass
class Embedding:
    """Input embeddings that stand for something in a prompt.

    Attributes:
        vectors: float32 [tokens, width] on the CPU.
        info: plain data about them, JSON-able; ``recorded`` lists the fields.
    """

    vectors: torch.Tensor
    info: dict = field(default_factory=dict)


def recorded(found, model, fingerprint, method, settings, what):
    """An ``Embedding`` of learned tokens, with the record that goes into a file.

    Args:
        found: ``inversion.Inverted``.
        fingerprint: of the base model, without patches.
        method: how the tokens were found.
        settings: ``inversion.Settings``.
        what: what the tokens stand for, in the user's words.
    """
    losses = found.losses
    info = {
        "what": what,
        "method": method,
        "settings": asdict(settings),
        "base.family": model.family.key,
        "base.fingerprint": fingerprint,
        "loss": {"first": losses[0], "last": losses[-1], "steps": len(losses)},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
    }
    return Embedding(found.vectors, info)


def save_embedding(embedding, path, family):
    """Write the file, whole or not at all; a file that is there already stays as it is.

    Raises:
        ForgetError: the file exists, the folder cannot be written to, or vectors are not finite.
    """
    path = Path(path)
    if path.exists():
        raise ForgetError(f"'{path.name}' exists already in {path.parent}: choose another name.")
    if not torch.isfinite(embedding.vectors).all():
        raise ForgetError("The learned tokens are not finite: lower the learning rate.")
    tensors = {KEY: embedding.vectors.float().contiguous()}
    metadata = {f"fmn.{key}": json.dumps(value) for key, value in embedding.info.items()}
    # A user can hand us characters that no UTF-8 file holds.
    title = embedding.info.get("what", path.stem).encode("utf-8", "replace").decode()
    metadata |= {
        "fmn.embedding": FORMAT,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.architecture}/textual-inversion",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
    }
    write_whole(path, lambda file: save_file(tensors, file, metadata=metadata))
    return path


def load_embedding(path, width):
    """Read and check a file that anyone may have made, with one tensor of any name.

    Args:
        width: of the text encoder's input embeddings.

    Raises:
        ForgetError: it is no embedding for such an encoder.
    """
    path = Path(path)
    _check_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            keys = list(file.keys())
            if len(keys) != 1:
                raise ForgetError(
                    f"'{path.name}' holds {len(keys)} tensors and an embedding has one: it is for "
                    "a model with several text encoders, or no embedding."
                )
            _check_tensor(path, file.get_slice(keys[0]), width)
            vectors = file.get_tensor(keys[0]).float().reshape(-1, width)
    except SafetensorError as error:
        raise ForgetError(
            f"'{path.name}' is damaged or not a safetensors file ({error}): get it again."
        ) from error
    if not torch.isfinite(vectors).all():
        raise ForgetError(f"'{path.name}' holds NaN or infinite values: do not use it.")
    return Embedding(vectors, _info(path, metadata))


def _check_size(path):
    try:
        size = path.stat().st_size
        path.open("rb").close()
    except OSError as error:
        raise ForgetError(
            f"'{path}' cannot be read ({error.strerror}): check the name and its folder."
        ) from error
    # This bounds the header as well: safetensors refuses one that is longer than its file.
    if size > MAX_BYTES:
        raise ForgetError(
            f"'{path.name}' has {size} bytes and we read embeddings of at most {MAX_BYTES}: it is "
            "some other file."
        )


def _check_tensor(path, tensor, width):
    shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
    if kind not in FLOATS:
        raise ForgetError(
            f"'{path.name}' stores its tokens as {kind}: an embedding has 16- or 32-bit "
            "floating-point numbers."
        )
    # diffusers writes a single token without the first dimension.
    if shape != (width,) and not (
        len(shape) == 2 and 1 <= shape[0] <= MAX_TOKENS and shape[1] == width
    ):
        raise ForgetError(
            f"'{path.name}' has shape {list(shape)}, and this text encoder takes 1 to "
            f"{MAX_TOKENS} tokens of width {width}: use an embedding for this model's family."
        )


def _info(path, metadata):
    """Our part of the header, checked: it is text from a stranger."""
    info = {}
    try:
        for name, kind in INFO_TYPES.items():
            if f"fmn.{name}" in metadata:
                info[name] = json.loads(metadata[f"fmn.{name}"])
                if not isinstance(info[name], kind):
                    raise TypeError(name)
    except (ValueError, TypeError, RecursionError) as error:
        raise ForgetError(
            f"The metadata of '{path.name}' is damaged ({type(error).__name__}): get it again."
        ) from error
    return info
