"""Metadata in, places of bytes out: pure, deterministic, no I/O, no communication."""
