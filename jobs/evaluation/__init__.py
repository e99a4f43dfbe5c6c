"""Evaluate verdicts against labels: reading, grouping by generator, metrics with intervals, curves.

It computes only numbers; `report` displays them.
"""
