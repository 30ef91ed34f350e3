"""The operations of one decode step: attention, norms, gating, linear layers and sampling."""
