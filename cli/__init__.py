"""The command line of remap; installed as ``remap_cli``."""
