"""Transcripts of recordings of any length.

- `transcriber`: from audio files or log-mels to transcripts;
- `long_form`: decoding window by window; `windows`: where windows begin and end;
- `streams`: long recordings, few of whose samples are in memory;
- `safeguards`: Whisper's fallback against loops and inventions, for scores as well;
- `confidence`: word confidences from posterior draws;
- `transcripts`: transcripts as objects, JSON, SRT and VTT; `outputs`: files of transcripts.
"""

from blora_pyro.transcription.transcriber import Transcriber, transcribe_features, transcribe_files

__all__ = ["Transcriber", "transcribe_features", "transcribe_files"]
