"""Choices of merging, for front ends that have not loaded anything yet."""

HOW = ("concatenate", "joint")
PRESERVE = 10.0  # of joint merging: weight of kept prompts
