"""A toy method, loss and data source for remap."""
