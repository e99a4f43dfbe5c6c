"""What a source holds: its containers and lists, the rows of a manifest, labels, layouts of benchmarks, drawn images.

Here an image is a row with a place; its bytes are fetched here, and decoded in `pipeline`.
"""
