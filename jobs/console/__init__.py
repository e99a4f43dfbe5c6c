"""Talking to a person: exit codes, options that commands share, lines on stderr, results and tables on stdout.

With the commands, the only place that imports click. Nothing here knows what a command does.
"""
