"""What a network was called with, in what state it was, and where in a denoising run. Knows no tokens."""
