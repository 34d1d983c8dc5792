"""Receipts -> one published directory: the ranks vote, rank 0 proves coverage and renames."""
