"""Models: loading, the built-in tiny one, prompt encoding, attention over packed tokens, and the packed forward."""
