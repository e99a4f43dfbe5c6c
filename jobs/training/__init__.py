"""Code of a training process under Ray Train: examples, order, ingest, loop, validation, checkpoints, tracking.

`experiments` does the work before its first step and after its last.
"""
