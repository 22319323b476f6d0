"""The command line of remap; installed as ``remap_cli``."""

from remap_cli import streams

streams.open_closed()  # before any of the modules looks at them
