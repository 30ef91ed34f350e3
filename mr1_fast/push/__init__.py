"""The model card of a run, and the upload of its final/ to the Hugging Face Hub."""
