"""BLoRA as a probabilistic program: adapt Whisper without losing what it already knew."""

__version__ = "0.1.0"
