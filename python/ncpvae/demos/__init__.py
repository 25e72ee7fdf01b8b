"""Complete experiments on small data: `python -m ncpvae demo [gaussians|digits|mnist]`."""
