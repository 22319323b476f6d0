"""Checked reads of files from anywhere, atomic writes, paths and names, disk space, links."""
