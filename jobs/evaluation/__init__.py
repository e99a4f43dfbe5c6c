"""Verdicts against labels: reading them, grouping by generator, every metric with its interval, curves.

Numbers only. The page that shows them is `report`.
"""
