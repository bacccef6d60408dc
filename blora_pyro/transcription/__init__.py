"""Transcripts of recordings of any length.

- `transcriber`: from audio files or log-mels to transcripts;
- `long_form`: decoding window by window; `windows`: where windows begin and end;
- `confidence`: word confidences from posterior draws;
- `transcripts`: transcripts as objects, JSON, SRT and VTT; `outputs`: files of transcripts.
"""

from blora_pyro.transcription.transcriber import Transcriber, transcribe_features, transcribe_files

__all__ = ["Transcriber", "transcribe_features", "transcribe_files"]
