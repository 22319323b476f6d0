"""Backbones: building timm models, reading their anatomy, and the embedded mini pair."""
