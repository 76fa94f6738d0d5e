"""What is a model worth: held-out pairs scored, replies, figures with intervals."""
