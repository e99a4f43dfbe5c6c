"""The console: exit codes, options that commands share, messages on stderr, results and tables on stdout.

Only this package and the commands import click. It does not know what a command does.
"""
