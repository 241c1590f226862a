"""Training, evaluation, checkpoints and launching."""
