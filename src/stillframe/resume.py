"""The start from a published checkpoint: which one, agreed by all ranks, and everything put back."""
