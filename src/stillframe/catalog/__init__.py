"""Which checkpoints exist: the run directory is the database."""
