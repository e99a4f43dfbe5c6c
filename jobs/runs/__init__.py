"""Publishing exactly once: the lock of an output, attempts of a run, the publication, the catalog of what was
published.

Knows rows and files, not what makes them: that is a workflow's pipeline.
"""
