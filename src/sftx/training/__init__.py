"""The loop and what it needs: losses, optimizers, schedules, checkpoints."""
