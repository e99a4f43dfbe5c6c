"""Sources of images: containers, lists, manifest rows, labels, layouts of benchmarks, synthetic images.

Here an image is a manifest row with an address. This package fetches its bytes; `pipeline` decodes them.
"""
