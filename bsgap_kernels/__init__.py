"""Near-rank and spectral metrics of activations, cheap enough to run at every training step."""
