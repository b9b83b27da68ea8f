"""Re-read, this pack's closed form, and its training against attacks; see ``method``."""

from .method import ABOUT, PRESETS, REVISION, TITLE, TRANSFORMERS, Settings, run

__all__ = ["ABOUT", "PRESETS", "REVISION", "TITLE", "TRANSFORMERS", "Settings", "run"]
