"""A token of its own for a language that Whisper does not know, learned before any adapter.

    python experiments/real/new_token.py --base whisper-base --output whisper-base-qu

Whisper's vocabulary has no room, and programs like faster-whisper know its languages by name: so
the new token takes the place of one that nothing else uses, Hawaiian's. Its embedding starts as the
nearest language's (Tagalog's, which `--language-map auto` chooses) and is the only thing that is
trained, on the NLL of the training texts; all other weights are the base's, bit by bit, so that
what it says in other languages stays as it is but for one logit. To compare it on dev, `study.toml`
is run with it as the base, with `language_map = { qu = "haw" }` and the method `informed-normal`.
"""

import argparse
import json
from pathlib import Path

import torch
from records import origin
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import BaseModelOutput

from blora_pyro import FitConfig, load_base
from blora_pyro.data import IGNORED, batch_indices
from blora_pyro.models import map_languages
from blora_pyro.models.encoder_states import last_states
from blora_pyro.runs.loading import Loader

PLACE, NEAREST = "<|haw|>", "<|tl|>"


def main() -> None:
    """Learn the row, write the checkpoint, print the NLL on the way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", default="whisper-base")
    parser.add_argument("--speech", type=Path, default=Path("human-speech"))
    parser.add_argument("--output", type=Path, default=Path("whisper-base-qu"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    base = load_base(arguments.base)
    net, tokenizer = base.net.requires_grad_(False), base.tokenizer
    place, nearest = (tokenizer.convert_tokens_to_ids(one) for one in (PLACE, NEAREST))
    map_languages(net, {"qu": PLACE.strip("<|>")})
    examples = Loader(base, FitConfig(base=arguments.base)).load(
        str(arguments.speech / "train.jsonl"), "train", limit=200
    )
    row = net.model.decoder.embed_tokens.weight[nearest].clone().requires_grad_()

    def with_row(
        module: object, tokens: tuple[torch.Tensor], embedded: torch.Tensor
    ) -> torch.Tensor:
        return torch.where((tokens[0] == place)[..., None], row, embedded)

    hook = net.model.decoder.embed_tokens.register_forward_hook(with_row)
    adam = torch.optim.Adam([row], arguments.lr)
    drawn = batch_indices(examples.sources, 8, seed=0)
    losses: list[float] = []
    for step, indices in zip(range(arguments.steps), drawn, strict=False):
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
        losses.append(float(loss))
        if step % 25 == 24:
            print(f"step {step + 1}: NLL {sum(losses[-25:]) / 25:.3f} nats a token", flush=True)
    hook.remove()
    with torch.no_grad():
        net.model.decoder.embed_tokens.weight[place] = row
    net.save_pretrained(arguments.output)
    base.feature_extractor.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    about = {**origin(), "nearest": NEAREST, "place": PLACE, "losses": losses}
    (arguments.output / "new_token.json").write_text(json.dumps(about) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
