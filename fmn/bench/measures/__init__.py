"""What is measured. Each measure is a function from a ``trial.Trial`` to plain data."""
