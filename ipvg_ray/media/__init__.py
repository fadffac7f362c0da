"""Encoded pictures and video files: the one place that decodes and encodes them."""
