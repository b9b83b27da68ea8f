"""The recipe of a patch: a hash of all that decides it, by which a batch knows its files again.

Version 0.1 hashed its code instead of naming a revision. ``code_0_1.json`` holds those hashes, so
that its patches are kept where methods still make the same.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..concepts import wordlists
from ..concepts.concept import Concept, Prompt
from ..methods import preset_of, revision
from ..models.families import layers
from ..models.interface import Model
from ..patches.metadata import FORMAT
from ..settings import Settings

PROBE = Prompt("a photo", "a photo")


def recipe(model_hash: str, concept: Concept, settings: Settings, keep: Iterable[str] = ()) -> str:
    """The recipe, 64 hex digits, for a model of that ``hash_model``.

    The VAE that encodes reference pictures is not part of it.
    """
    return _hash(
        _request(concept, settings, keep)
        | {"model": model_hash, "revision": revision(preset_of(settings)), "lists": _hash_lists()}
    )


def recipe_0_1(
    model_hash: str, concept: Concept, settings: Settings, keep: Iterable[str] = ()
) -> str | None:
    """What version 0.1 wrote for a patch that is the same today, for a model of that
    ``hash_model_0_1``; None if there is none."""
    known = _code_0_1()
    changed = revision(preset_of(settings)) != 1 or _hash_lists() != known["lists"]
    if changed or settings.method not in known["methods"]:
        return None
    former = {
        each.metadata.get("formerly") or each.name: getattr(settings, each.name)
        for each in fields(settings)
    }
    code = known["methods"][settings.method]
    return _hash(
        _request(concept, settings, keep)
        | {"model": model_hash, "version": "0.1.0", "code": code, "settings": former}
    )


def _request(concept: Concept, settings: Settings, keep: Iterable[str]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "method": settings.method,
        "settings": asdict(settings),
        "concept": concept.describe(),
        "pictures": None if concept.images is None else _hash_tensors([concept.images]),
        "learned": _hash_tensors(concept.learned),
        "keep": list(keep),
    }


def hash_model(model: Model) -> str:
    """Distinguishes a model with its LoRAs and its text encoder from others: 64 hex digits.

    It covers a row of each layer, an encoded prompt, and the noise schedule.
    """
    return hashlib.sha256((_name(model) + _hash_sample(model)).encode()).hexdigest()


def hash_model_0_1(model: Model) -> str | None:
    """The same as version 0.1 computed it; None for hosts that it did not have."""
    host = type(model).__module__.rpartition("fmn.")[2]
    code = _code_0_1()["hosts"].get(host)
    if code is None:
        return None
    return hashlib.sha256(f"{_name(model)}{code} {_hash_sample(model)}".encode()).hexdigest()


def _name(model: Model) -> str:
    family = model.family
    name = family.title if family.known else family.base_version
    return f"{family.key} {name} {model.prediction} {model.fingerprint()} "


def _hash_sample(model: Model) -> str:
    parts = [model.encode(PROBE).context]
    # Borrowed, all weights hold the user's LoRAs. Of a quantised model they do where it is loaded.
    with model.watch() if model.quantised else model.borrow_denoiser() as denoiser:
        parts += [denoiser.module(layer.name).weight[:1] for layer in layers(model.family)]
        rows = [part.detach().to("cpu", torch.float16) for part in parts]
        # In float32: float16 cannot tell the ends of schedules apart.
        rows.append(denoiser.schedule.levels)
    return _hash_tensors(rows)


@cache
def _code_0_1() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("code_0_1.json").read_text("utf-8"))


@cache
def _hash_lists() -> str:
    """Hash of the shipped word lists that decide what is kept.

    ``things`` is left out: only Re-read looks there, and its revision stands for that list.
    """
    names = sorted(path.stem for path in wordlists.FOLDER.glob("*.txt") if path.stem != "things")
    return _hash({name: wordlists.entries(name) for name in names})


def _hash(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _hash_tensors(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().cpu().float().contiguous()
        digest.update(f"{tuple(values.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()
