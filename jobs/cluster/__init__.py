"""The Ray cluster that a command runs on: its address, an embedded one, and the shares that stages take of it.

What runs on it belongs to `pipeline` and `training`.
"""
