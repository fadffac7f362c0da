"""Networks that the metrics score with, under the key names of their published weights. Plain torch."""
