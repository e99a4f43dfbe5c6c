"""Everything that knows Ray, storage or the command line."""
