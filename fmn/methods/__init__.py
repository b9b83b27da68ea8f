"""Ways to forget: one module a method, each with a settings dataclass and ``run``."""
