"""The training loop and what belongs to it: checkpoints, schedule, logs, validation, stopping."""
