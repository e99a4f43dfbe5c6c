"""What `nsnet audit` finds in a labelled source: inventory, duplicates, labels that metadata give away; its text."""
