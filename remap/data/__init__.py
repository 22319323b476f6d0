"""Images, labels, views and the order they are seen in."""
