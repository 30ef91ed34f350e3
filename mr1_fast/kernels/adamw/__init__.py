"""AdamW with 8-bit states whose updates are not lost in bf16 weights."""
