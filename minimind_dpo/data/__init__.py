"""Preference data: rows of a source -> validated pairs -> token ids and completion masks -> packed batches."""
