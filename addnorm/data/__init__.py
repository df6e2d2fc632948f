"""Data sets: text corpora and tokenizers; no torch here."""
