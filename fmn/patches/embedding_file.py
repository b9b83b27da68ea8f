"""Learned tokens as a file: a textual-inversion embedding that other programs read too.

One float32 tensor [tokens, width] named ``emb_params``, as common trainers name it. ComfyUI, A1111
and diffusers take a file's only tensor whatever its name is.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import ForgetError
from ..files import AnyPath, write_whole
from ..models.families import Family
from .metadata import loss_info, stamp

FORMAT = "1"
KEY = "emb_params"


@dataclass
class Embedding:
    """Input embeddings that stand for something in a prompt.

    Attributes:
        vectors: float32 [tokens, width] on the CPU.
        info: the record that goes into the file, plain data for JSON.
    """

    vectors: torch.Tensor
    info: dict[str, Any] = field(default_factory=dict)


def embedding_of(
    vectors: torch.Tensor, losses: Sequence[float], family: Family, fingerprint: str, method: str,
    settings: dict[str, Any], meaning: str,
) -> Embedding:  # fmt: skip
    """Learned tokens with the record that goes into their file.

    Args:
        vectors: [tokens, width]. losses: of learning them.
        fingerprint: of the base model, without patches.
        method: by which the tokens were learned.
        settings: ``training.textual_inversion.Settings`` as a dict.
        meaning: of the tokens, in the user's words.
    """
    info = {
        "what": meaning,
        "method": method,
        "settings": settings,
        "base.family": family.key,
        "base.fingerprint": fingerprint,
        "loss": loss_info(losses),
        **stamp(),
    }
    return Embedding(vectors, info)


def save_embedding(embedding: Embedding, path: AnyPath, family: Family) -> Path:
    """Write the file, whole or not at all; an existing file stays as it is.

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
    # Not all that a user can type is valid UTF-8.
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
