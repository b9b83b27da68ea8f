"""Where learned words are saved, so that prompts can use them."""

import os
import re
from pathlib import Path

import folder_paths

from ..fmn.errors import ForgetError

FOLDER = "embeddings"
NAME = re.compile(r"[A-Za-z0-9_-]{1,80}(/[A-Za-z0-9_-]{1,80})*")


def embedding_path(name):
    """Where a new ``embedding:NAME`` goes: ComfyUI's first folder for embeddings.

    Raises:
        ForgetError: a prompt could not use the name, it leads out of the folder, or it is taken.
    """
    if not NAME.fullmatch(name):
        raise ForgetError(
            f"'{name:.60}' cannot name an embedding: use letters, digits, - and _, with / for "
            f"folders inside models/{FOLDER}."
        )
    listed = [file.replace(os.sep, "/") for file in folder_paths.get_filename_list(FOLDER)]
    for file in listed:
        # ComfyUI looks for a name in subfolders too.
        if f"/{file.rpartition('.')[0]}".endswith(f"/{name}"):
            raise ForgetError(
                f"There is an embedding '{file}' already, which 'embedding:{name}' would mean: "
                "choose another name, or remove that file."
            )
    return Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{name}.safetensors"
