"""Weights in other libraries' layouts: one file a library says how its keys and its configuration become timm's."""
