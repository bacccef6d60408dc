"""A run on the Hugging Face Hub: `uploads` writes and pushes it, with its `model_card`."""
