"""Ray Data stages from manifest rows to verdicts: fetching, guarded decoding, captioning, scoring, and progress.

The stages are thin shells over `nsnet`. `runs` decides which rows are due and how results are published.
"""
