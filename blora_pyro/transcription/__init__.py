"""Recordings to transcripts.

- `transcribing`: the whole way; `hearing`: window by window, batched across recordings; `windows`,
  `pauses`: where they begin and end;
- `confidence`: how sure draws are of words; `calibration`: how true that is;
- `transcripts`, `subtitles`, `files`: what was said, as objects, SRT and VTT, and on disk.
"""

from blora_pyro.transcription.transcribing import Transcriber, transcribe_features, transcribe_files

__all__ = ["Transcriber", "transcribe_features", "transcribe_files"]
