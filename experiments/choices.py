"""What `study.toml` can't compare on whisper-base: a token of its own for Kichwa, and layers.

    python experiments/choices.py --base whisper-base --speech human-speech

`token`: Whisper's vocabulary has no room, and programs like faster-whisper know its languages by
name. So the new token takes the place of one that nothing else uses, Hawaiian's. Its embedding
starts as that of the nearest language (Tagalog, which `--language-map auto` chooses) and is the
only thing that is trained, on the NLL of the training texts; all other weights are the base's, bit
by bit, so that what it says in other languages stays as it is but for one logit. The checkpoint is
then fitted as `informed-normal` of the study is.

`decoder` and `layers`: LoRA on the decoder's layers and on those of the paper, at equal steps. They
are few, since a step of the latter takes about ten times as long.

Dev, without a score of the base, which is a row of the study. A row of `choices.json` that is there
is not made again.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from records import ROOT, Notes, origin
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import BaseModelOutput

from blora_pyro import FitConfig, fit, load_base
from blora_pyro.data import IGNORED, batch_indices
from blora_pyro.evaluation import rate_summary
from blora_pyro.files import read_json, write_json
from blora_pyro.models import map_languages
from blora_pyro.models.encoder_states import last_states
from blora_pyro.options import DECODER
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.loading import Loader
from blora_pyro.runs.scoring import NEW_DOMAIN, Scoring

PLACE, NEAREST = "haw", "tl"
LORA: dict[str, Any] = {"guide": "point", "beta": 0.0, "lr": 1e-3, "language_map": {"qu": NEAREST}}
FEW: dict[str, Any] = {**LORA, "steps": 25, "max_eval_utterances": 30}
CHOICES: dict[str, dict[str, Any]] = {
    "token": {"prior": "base-informed", "language_map": {"qu": PLACE}},
    "decoder": {**FEW, "rank": 16, "target_modules": DECODER, "cache_encoder": True},
    "layers": {**FEW, "rank": 32, "alpha": 64.0, "target_modules": ".*(q_proj|v_proj)"},
}


def main() -> None:
    """Fit, score and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", default="whisper-base")
    parser.add_argument("--speech", type=Path, default=Path("human-speech"))
    parser.add_argument("--runs", type=Path, default=Path("runs/choices"))
    parser.add_argument("--choices", nargs="*", default=[*CHOICES], choices=[*CHOICES])
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    output = ROOT / "experiments" / "real" / "choices.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    content = read_json(arguments.output) if arguments.output.is_file() else {"rows": {}}
    speech = arguments.speech
    for name in arguments.choices:
        if name in content["rows"]:
            continue
        base = arguments.base
        if name == "token":
            base = str(arguments.runs / "with-token")
            if not (Path(base) / "config.json").is_file():
                learn_token(arguments.base, speech, Path(base))
        config = FitConfig(
            base=base,
            data=str(speech),
            backward={
                code: str(speech / f"back-{code}.jsonl") for code in ("en", "es", "fr", "de")
            },
            max_utterances=200,
            **{"steps": 100, "max_eval_utterances": 60, **CHOICES[name]},
        )
        folder = arguments.runs / name
        run = fit(config, folder, evaluate=False, resume=True, progress=Notes())
        scores = Scoring.of(run.config, "dev", Listener()).score(run.posterior)
        seconds = read_json(folder / "run.json").get("seconds")  # of the fit
        row = {**summary(scores), "seconds": seconds, **origin()}
        content["rows"][name] = row
        write_json(arguments.output, content)
        errors = (row["new_domain"]["rate"], row["backward_error"]["rate"])
        print(name, *(f"{100 * one:.1f}" for one in errors), flush=True)


def summary(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return the errors of a fit, with intervals over utterances."""
    old = {name: one for name, one in scores.items() if name != NEW_DOMAIN}
    return {
        "new_domain": rate_summary([scores[NEW_DOMAIN]]),
        "backward": {name: rate_summary([one]) for name, one in old.items()},
        "backward_error": rate_summary([*old.values()]),
    }


def learn_token(name: str, speech: Path, output: Path, steps: int = 100, lr: float = 3e-3) -> None:
    """Write a checkpoint whose token `PLACE` is learned; print the NLL on the way, nats a token."""
    torch.manual_seed(0)
    base = load_base(name)
    net, tokenizer = base.net.requires_grad_(False), base.tokenizer
    place, nearest = (tokenizer.convert_tokens_to_ids(f"<|{one}|>") for one in (PLACE, NEAREST))
    map_languages(net, {"qu": PLACE})
    examples = Loader(base, FitConfig(base=name)).load(str(speech), "train", limit=200)
    embedding = net.model.decoder.embed_tokens
    row = embedding.weight[nearest].clone().requires_grad_()

    def with_row(_: object, tokens: tuple[torch.Tensor], embedded: torch.Tensor) -> torch.Tensor:
        return torch.where((tokens[0] == place)[..., None], row, embedded)

    hook = embedding.register_forward_hook(with_row)
    adam = torch.optim.Adam([row], lr)
    drawn = batch_indices(examples.sources, 8, seed=0)
    for step, indices in zip(range(1, steps + 1), drawn, strict=False):
        batch = examples.batch(indices)
        assert batch.labels is not None
        heard = last_states(net, examples.fingerprint, examples.features, indices)
        logits = net(
            encoder_outputs=BaseModelOutput(last_hidden_state=heard.clone()),
            decoder_input_ids=batch.decoder_input_ids,
            use_cache=False,
        ).logits
        loss = cross_entropy(logits.transpose(1, 2), batch.labels, ignore_index=IGNORED)
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step in (1, steps) or step % 25 == 0:
            print(f"token, step {step}: NLL {loss.item():.3f}", flush=True)
    hook.remove()
    with torch.no_grad():
        embedding.weight[place] = row
    base.save_pretrained(output)


if __name__ == "__main__":
    main()
