"""Render an evaluation as an HTML page: figures, plots, wording and template, without scripts or requests.

The package computes no metrics; they come from `evaluation`.
"""
