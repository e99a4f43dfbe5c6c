"""The page of an evaluation: figures, plots, wording and template, without scripts or requests.

Computes nothing: numbers come from `evaluation`.
"""
