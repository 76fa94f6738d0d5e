"""A run, from its configuration to what it leaves."""
