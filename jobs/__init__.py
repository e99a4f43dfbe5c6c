"""All code that uses Ray, storage or the command line."""
