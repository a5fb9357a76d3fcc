"""Readers of packed weights: one file a family of formats. `detect` decides which of them reads what."""
