"""Findings of `nsnet audit` in a labelled source: inventory, duplicates, metadata bias; and their text."""
