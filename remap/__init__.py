"""remap: distil a large vision transformer into a small one tuned by a parameter-efficient method."""
__version__ = "0.1.0"
