"""Files on disk and in object stores: addresses, listing, reading, writing, Parquet, and classification of errors.

This is the only package that opens a URI or imports fsspec. It does not know what the bytes mean.
"""
