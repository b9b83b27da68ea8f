"""CLIP (Radford et al. 2021) as a judge of anything that can be said in words: zero-shot.

The model comes from a folder as transformers saves it; nothing is downloaded.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn.functional import normalize

from ..concepts.prompt_templates import fill
from ..errors import ForgetError
from ..files import check_parts, check_texts
from ..images import to_image
from .judge import check_images, labels_of

BATCH = 32


class ClipJudge:
    """A judge of any domains; see ``judge.Judge``.

    Args:
        folder: of a ``CLIPModel`` with its tokenizer and image processor.
        phrases: {label: phrase} for each domain, e.g. {"concept": {"dog": "a dog"}}.
        templates: a sentence with {} for the phrase, for each domain; "{}" where there is none.

    Raises:
        ForgetError: transformers or files are missing, or phrases or templates are unusable.
    """

    labels: dict[str, tuple[str, ...]]

    def __init__(
        self,
        folder: str | Path,
        phrases: Mapping[str, dict[str, str]] | None = None,
        templates: dict[str, str] | None = None,
    ):
        phrases = phrases or {}
        sentences = _fill(phrases, templates or {})
        self.name = f"clip:{folder}"
        self.labels = {domain: tuple(labels) for domain, labels in phrases.items()}
        self._model, self._tokenizer, self._processor = _load(folder)
        self._classes = {domain: self._embed_texts(s) for domain, s in sentences.items()}

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor, domain: str) -> torch.Tensor:
        """Softmax of the cosines times the model's own scale (100 in OpenAI's)."""
        labels_of(self, domain)
        cosines = self.features(images) @ self._classes[domain].T
        return torch.softmax(self._model.logit_scale.exp() * cosines, -1)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings of length 1, [N, F]."""
        return torch.cat([self._embed_images(part) for part in check_images(images).split(BATCH)])

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """CLIP score of each picture with its prompt, [N]: 100 max(cos, 0).

        Hessel et al. 2021 (arXiv 2104.08718) define it with 2.5 in place of 100 and with the
        prefix "A photo depicts"; papers on erasing use 100 and the bare prompt, as here.
        """
        if len(prompts) != len(images):
            raise ForgetError(
                f"There are {len(images)} pictures and {len(prompts)} prompts: give one each."
            )
        cosines = (self.features(images) * self._embed_texts(prompts)).sum(-1)
        return 100 * cosines.clamp(min=0)

    @torch.no_grad()
    def _embed_texts(self, sentences: Sequence[str]) -> torch.Tensor:
        tokens = self._tokenizer(
            list(sentences), padding=True, truncation=True, return_tensors="pt"
        )
        pooled = self._model.text_model(**tokens).pooler_output
        return normalize(self._model.text_projection(pooled), dim=-1)

    def _embed_images(self, images: torch.Tensor) -> torch.Tensor:
        pictures = [to_image(image) for image in images]
        pixels = self._processor(images=pictures, return_tensors="pt")
        pooled = self._model.vision_model(**pixels).pooler_output
        return normalize(self._model.visual_projection(pooled), dim=-1)


def _fill(phrases: Mapping[str, dict[str, str]], templates: dict[str, str]) -> dict[str, list[str]]:
    """Sentences for each domain."""
    if not phrases or not all(phrases.values()):
        raise ForgetError(
            "CLIP is asked about words, and there are none: give {label: phrase} for each domain."
        )
    for domain, template in templates.items():
        if domain not in phrases:
            raise ForgetError(f"There is a template for '{domain}', which has no phrases.")
        if template.count("{}") != 1:
            raise ForgetError(f"The template '{template}' needs {{}} once, where the phrase goes.")
    return {
        domain: [fill(templates.get(domain, "{}"), phrase) for phrase in labels.values()]
        for domain, labels in phrases.items()
    }


def _load(folder: str | Path) -> tuple[Any, Any, Any]:  # classes of transformers
    """(model, tokenizer, image processor) in float32 from a folder."""
    if not Path(folder, "config.json").is_file():
        raise ForgetError(
            f"There is no CLIP model in '{folder}': give clip: and the folder of one, with "
            "config.json in it; nothing is downloaded."
        )
    try:
        from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer
    except ImportError as error:
        raise ForgetError(
            f"CLIP needs transformers, which cannot be loaded ({error}): "
            "install it with 'pip install \"transformers>=5\"'."
        ) from error
    # Without these transformers makes a tokenizer that knows no word, and says nothing.
    if not Path(folder, "tokenizer.json").is_file() and not all(
        Path(folder, file).is_file() for file in ("vocab.json", "merges.txt")
    ):
        raise _unusable(folder, "it has neither tokenizer.json nor vocab.json with merges.txt")
    check_texts(Path(folder))
    local = {"local_files_only": True}
    try:
        model, info = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **local
        )
        tokenizer = CLIPTokenizer.from_pretrained(folder, **local)
        # PIL's resizing is that of the original; torchvision's differs a little.
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **local)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        check_parts(Path(folder))
        raise _unusable(folder, str(error).strip().splitlines()[0].rstrip(".")) from error
    if info["missing_keys"]:  # transformers would go on with random numbers
        raise _unusable(folder, f"weights are missing, {min(info['missing_keys'])} for one")
    return model.eval(), tokenizer, processor


def _unusable(folder: str | Path, reason: str) -> ForgetError:
    return ForgetError(
        f"The CLIP model in '{folder}' cannot be loaded ({reason}): give a folder with model, "
        "tokenizer and image processor as transformers saves them."
    )
