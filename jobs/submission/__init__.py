"""Submitted jobs: what `nsnet submit` sends to a cluster, how it follows the job, and what the job does first.

`job` runs in the cluster, everything else where the operator types. Nothing here knows what a command does.
"""
