"""Forget-Me-Not: make a text-to-image model forget a concept, as a small LoRA file.

The package knows neither ComfyUI nor diffusers; the files in ``fmn.hosts`` do. Importing it
loads nothing heavy.
"""

__version__ = "0.1.0"
