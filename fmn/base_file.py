"""What a checkpoint file is as a base for patches, from its header and a few rows of weights."""

from safetensors import SafetensorError, safe_open

from . import other
from .checkpoint import KEYS_AND_VALUES, UNET_PREFIX
from .errors import ForgetError
from .families import identify
from .model import fingerprint

PREFIXES = UNET_PREFIX, ""  # a whole checkpoint; a diffusion model alone


def base_of(path):
    """(family's key, fingerprint) of a safetensors file, without loading the model.

    The key is "other" and the fingerprint "" for a model that is none of ``families.FAMILIES``.

    Raises:
        ForgetError: not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            for prefix in PREFIXES:
                family = identify(_shapes(file, keys, prefix))
                if family:
                    return family.key, fingerprint(family, _weights(file, keys, prefix))
    except (SafetensorError, OSError) as error:
        raise ForgetError(
            f"'{path}' is damaged or not a safetensors checkpoint ({error}): get it again."
        ) from error
    return other.KEY, ""


def _shapes(file, keys, prefix):
    return {
        key[len(prefix) : -len(".weight")]: file.get_slice(key).get_shape()
        for key in keys
        if key.startswith(prefix) and key.endswith(KEYS_AND_VALUES)
    }


def _weights(file, keys, prefix):
    known = set(keys)

    def first_rows(layer):
        names = (f"{prefix}{name}.weight" for name in (layer.compvis, layer.name))
        return file.get_slice(next(name for name in names if name in known))[:4]

    return first_rows
