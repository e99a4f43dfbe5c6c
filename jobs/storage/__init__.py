"""Bytes on disk and in object stores: addresses, listing, reading, writing, Parquet, and what errors of a store mean.

The only package that opens a URI, and the only one that imports fsspec. What the bytes mean is not known here.
"""
