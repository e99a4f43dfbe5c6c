"""Make a detector bundle from a request: inputs, split, projection, training, predictions, export; also ablations.

The top layer: it uses every other package, and only commands use it.
"""
