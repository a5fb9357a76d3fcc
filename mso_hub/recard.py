"""The model card of a finished checkpoint, from what verify finds."""
