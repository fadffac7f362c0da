"""Identity sets in, exports out."""
