"""The GRPO loss on logits and on hidden states: equations, row operations, operators."""
