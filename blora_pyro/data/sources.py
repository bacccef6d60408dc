"""Where a split of data comes from: a built-in corpus, a manifest, a folder of manifests."""

from pathlib import Path

from datasets import Dataset

from blora_pyro.data.manifest import read_manifest
from blora_pyro.data.pocket import DOMAINS, LANGUAGES, corpus_dir
from blora_pyro.errors import UserError


def load_split(source: str | Path, split: str) -> Dataset:
    """Read a split of a source, with the columns of `read_manifest`.

    Args:
        source: a JSONL manifest (the same for every split), a folder that holds `{split}.jsonl`,
            or, where no such path exists, the name of a built-in corpus: "de-en", "de", ...
        split: "train", "dev", "test", or whatever the folder has.

    Raises:
        UserError: if the source is none of these, lacks the split, or `read_manifest` raises.
    """
    path = Path(source)
    if path.is_file():
        return read_manifest(path)
    if not path.exists() and source in (*DOMAINS, *LANGUAGES):
        path = corpus_dir(str(source))
    if not path.is_dir():
        raise UserError(
            f"no data at {str(source)!r}; give a JSONL manifest, a folder with {split}.jsonl, "
            f"or a built-in corpus: {', '.join((*DOMAINS, *LANGUAGES))}"
        )
    manifest = path / f"{split}.jsonl"
    if not manifest.is_file():
        splits = ", ".join(sorted(file.stem for file in path.glob("*.jsonl"))) or "none"
        raise UserError(f"{path} has no {manifest.name}; its splits are: {splits}")
    return read_manifest(manifest)
