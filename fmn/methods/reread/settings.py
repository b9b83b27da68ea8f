"""The settings of Re-read."""

from dataclasses import dataclass

from ...settings import Settings as Base
from ...settings import advanced, setting
from .. import shared_settings as shared


@dataclass(frozen=True)
class Settings(Base, method="reread"):
    overshoot: float = setting(
        0.4,
        "How far to overshoot, for all kinds but styles. 0: prompts are read as if the concept "
        "were not there. 1: as far again in the other direction. Higher forgets more reliably "
        "and harms neighbours more.",
        limits=(0.0, 4.0, 0.01),
        formerly="push",
    )
    overshoot_style: float = setting(
        0.7,
        "The same for styles, which need more: a model draws some style even when asked for none.",
        limits=(0.0, 4.0, 0.01),
        formerly="push_style",
    )
    stop_at: float = advanced(
        0.0,
        "Stop early: overshoot is raised in steps until at most this share of the concept's "
        "effect on the first predictions is left, or a step removes less than that. 0: always "
        "use the full overshoot.",
        limits=(0.0, 1.0, 0.01),
    )
    preserve: float = shared.preserve(default=10.0)
    damping: float = advanced(
        1e-3,
        "Ridge penalty (lambda) for each concept, relative to the mean square of the layer's "
        "inputs. Small: a stronger edit. Large: no edit.",
        limits=(1e-9, 1e6, 0.0001),
    )
    prompts: int = advanced(
        40,
        "Sentences with each name of the concept, from a fixed list; its own prompts are added. "
        "Fewer harm neighbours more.",
        limits=(1, 180),
    )
    keep_prompts: int = advanced(
        256,
        "Sentences with kept words. More do less harm and take longer to encode. Words and "
        "prompts connected to keep are added.",
        limits=(0, 10_000),
        formerly="kept",
    )
    words_per_prompt: int = advanced(
        1,
        "Kept words in each of these sentences. 1: one word a sentence. More: a list needs "
        "fewer sentences, and encoding is faster.",
        limits=(1, 6),
        formerly="together",
    )
    images_per_concept: int = advanced(
        4,
        "Images sampled for each concept to record queries, and as many without it and of kept "
        "prompts.",
        limits=(1, 64),
        formerly="drawn",
    )
    sampling_steps: int = advanced(4, "Sampling steps of each image.", limits=(1, 1000))
    guidance: float = advanced(
        3.5,
        "Guidance scale of these images. 1: no guidance, half the time.",
        limits=(1.0, 100.0, 0.1),
    )
    query_positions: int = advanced(
        8,
        "Query positions used from each image and step.",
        limits=(1, 1024),
        formerly="places",
    )
    rank: int = shared.solved_rank(default=8, advanced=True)
    robust_steps: int = setting(
        0,
        "Adversarial training steps for each concept, after the closed form. 0: none, the "
        "patch takes seconds. 300: learned words bring the concept back less often; takes far "
        "longer and harms more of what is kept.",
        limits=(0, 100_000),
        group="robust",
    )
    robust_overshoot: float = advanced(
        3.0,
        "With robust_steps: how far predictions move away from the concept. 0: as if it were "
        "not in the prompt. Higher resists attacks better and harms neighbours more.",
        limits=(0.0, 20.0, 0.1),
        group="robust",
        formerly="robust_push",
    )
    robust_preserve: float = advanced(
        1.5,
        "With robust_steps: weight of kept prompts. 0: they are not protected.",
        limits=(0.0, 1000.0, 0.1),
        group="robust",
    )
    robust_rank: int = advanced(
        3,
        "With robust_steps: rank of the change of self-attention and feed-forward layers.",
        limits=(1, 128),
        group="robust",
    )
    robust_pictures: int = advanced(
        24,
        "With robust_steps: pictures drawn of each concept, and twice as many of kept prompts.",
        limits=(1, 1000),
        group="robust",
    )
    robust_lr: float = shared.lr(
        2e-3, "With robust_steps: AdamW's learning rate at the start.", group="robust"
    )
    checkpointing: bool = shared.checkpointing()
    keep_list: str = shared.keep_list()
    size: int = shared.size()
    seed: int = shared.seed()
    passes: int = advanced(
        2,
        "Transformers only: how often layers are recorded and solved. Each pass sees the edits of "
        "the one before. 1: fastest.",
        limits=(1, 20),
        group="transformer",
    )
    transformer_overshoot: float = advanced(
        0.7,
        "Transformers: how far to overshoot, for all kinds, in place of overshoot and "
        "overshoot_style. Higher forgets more reliably and harms neighbours more.",
        limits=(0.0, 4.0, 0.01),
        group="transformer",
    )
    transformer_prompts: int = advanced(
        40,
        "Transformers: sentences with each name of the concept, in place of prompts. Fewer harm "
        "neighbours more.",
        limits=(1, 180),
        group="transformer",
    )
    transformer_damping: float = advanced(
        0.05,
        "Transformers: ridge penalty, in place of damping. Small: a stronger edit that harms "
        "neighbours more. Large: no edit.",
        limits=(1e-9, 1e6, 0.001),
        group="transformer",
    )
    near_words: int = advanced(
        48,
        "U-Nets: so many words that the model reads most like the concept are kept, too, found in "
        "the shipped lists. 0: none, and neighbours that nobody named are harmed.",
        limits=(0, 1000),
    )
    near_prompts: int = advanced(
        4, "Sentences with each of them, beside keep_prompts.", limits=(1, 100)
    )
    transformer_levels: int = advanced(
        1,
        "Transformers: noise levels at which layers are recorded, those of a drawing in so many "
        "steps. 1: pure noise alone. More take longer.",
        limits=(1, 20),
        group="transformer",
    )
    transformer_near_words: int = advanced(
        0,
        "Transformers: in place of near_words, and all words of the lists are encoded first. 0: "
        "none. More keep more neighbours, forget a little less and take longer.",
        limits=(0, 1000),
        group="transformer",
    )

    @property
    def trains(self) -> bool:  # type: ignore[override]
        return self.robust_steps > 0
