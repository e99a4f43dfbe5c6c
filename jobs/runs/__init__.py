"""Publish rows exactly once: the lock of an output, attempts of a run, publication, and the catalog of published runs.

This package handles rows and files; a workflow's pipeline makes the rows.
"""
