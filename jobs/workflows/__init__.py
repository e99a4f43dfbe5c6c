"""Workflows of the commands score, caption, predict and evaluate, and of examine: from arguments to the record.

Trainings, which consist of several runs, are in `experiments`.
"""
