"""Predict images while they are read: what is named, the networks' answers, and files of them."""
