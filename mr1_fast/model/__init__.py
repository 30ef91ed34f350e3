"""Models: loading them, encoding prompts, the forward pass over packed tokens, the reference."""
