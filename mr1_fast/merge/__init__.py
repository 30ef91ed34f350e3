"""Merging an adapter into its 16-bit model, layer by layer."""
