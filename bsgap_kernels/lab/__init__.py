"""The minimal trainer: data, models, training loop, sweeps and their results."""
