"""The trainer behind `stillframe train`: a Transformers model, FSDP2, and exports that do not stop it."""
