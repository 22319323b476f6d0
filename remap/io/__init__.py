"""Reads of files from anywhere, and writes that are whole or absent."""
