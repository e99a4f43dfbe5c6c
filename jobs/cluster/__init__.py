"""The Ray cluster that a command runs on: its address, an embedded cluster, and each stage's share of CPUs and GPUs.

What runs on it belongs to `pipeline` and `training`.
"""
