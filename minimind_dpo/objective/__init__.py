"""What is minimised, without accelerate: scores, losses, sums."""
