"""What a training process runs under Ray Train: examples, order, ingest, loop, validation, checkpoints, tracking.

What happens before its first step and after its last belongs to `experiments`.
"""
