"""Metrics of a run for Prometheus: the table of all series, and the functions that set and count them.

Ray's agent on each node exports what processes of a Ray cluster report. Imports Ray only where it is connected already.
"""
