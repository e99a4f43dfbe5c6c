"""Ray Data stages from a manifest's rows to verdicts: fetching, guarded decoding, captioning, scoring; and their
progress.

Thin shells over `nsnet`. Which rows are due, and how results are published, belongs to `runs`.
"""
