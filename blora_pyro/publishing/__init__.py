"""A run on the Hugging Face Hub.

- `uploads`: what goes up, and how; `model_card`: what is told of it there.
"""
