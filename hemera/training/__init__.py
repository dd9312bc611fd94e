"""What both trainings use: session, checkpoints, batches, logging."""
