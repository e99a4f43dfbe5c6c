"""From a request for a detector to its bundle: inputs, split, projection, training, predictions, export; ablations.

The top of the tree: it uses every other package, and nothing but commands uses it.
"""
