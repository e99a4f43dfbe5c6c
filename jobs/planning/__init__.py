"""The size of a cluster for a number of images, from measured or estimated rates: rates, arithmetic and text.

It starts nothing and imports no Ray. What a running cluster gives each stage is in `cluster`.
"""
