"""Device -> arena: one copy of this rank's own bytes, into memory that is already there."""
