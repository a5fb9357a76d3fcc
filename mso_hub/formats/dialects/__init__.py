"""How a scheme is named on disk: tensor suffixes and the JSON that a loader reads."""
