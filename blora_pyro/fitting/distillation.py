"""Distillation towards the frozen base: its own answers to prompts in other languages."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blora_pyro.adapters import Adapters
from blora_pyro.data import Batch, SoftTargets, prompt_ids
from blora_pyro.errors import UserError
from blora_pyro.models import Base
from blora_pyro.models.decoding import decode, encode

MAX_BYTES = 2**30  # of distributions that are kept to be used again


class Distillation:
    """Gives a batch's audio a second prompt, and the base's own answer to it as soft targets.

    Learning without forgetting (Li and Hoiem, arXiv 1606.09282) on the new domain's audio: every
    utterance is prompted in one of `languages`, drawn anew each step; the frozen base transcribes
    it greedily; and the adapted model is to give the next tokens of that transcript the base's
    probabilities (Hinton et al., arXiv 1503.02531, at temperature 1). So the answer to the new
    domain's own prompt may change, and the answers to the others should not. Only the new domain's
    data are needed.

    The base's answers do not change: they are computed once an utterance and language, and their
    distributions are kept as long as they fit into `MAX_BYTES`.
    """

    def __init__(
        self,
        base: Base,
        adapters: Adapters,
        languages: Sequence[str],
        weight: float,
        seed: int = 0,
        task: str = "transcribe",
    ) -> None:
        """A teacher for one set of examples.

        Args:
            base: The frozen Whisper.
            adapters: Its adapters, cleared whenever it transcribes.
            languages: Language codes, one token each.
            weight: Factor on the mean KL divergence in the loss.
            seed: Seed of the languages drawn.
            task: Task in the prompts.

        Raises:
            UserError: If there is no language, or the base does not know one.
        """
        if not languages:
            raise UserError(
                "distillation has no language to be asked in; name some in distillation_languages"
            )
        self.base, self.adapters, self.weight, self.seed = base, adapters, weight, seed
        self.prompts = [
            prompt_ids(base.tokenizer, one, task, base.language_map) for one in languages
        ]
        self._transcripts: dict[tuple[int, int], list[int]] = {}
        self._log_probs: dict[tuple[int, int], Tensor] = {}
        self._bytes, self._end = 0, int(base.net.config.eos_token_id)

    def __call__(self, batch: Batch, indices: Sequence[int], number: int) -> Batch:
        """Return the batch (on the CPU) with soft targets, in languages drawn by its number."""
        seeds = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        drawn = torch.randint(len(self.prompts), (len(indices),), generator=seeds).tolist()
        keys = list(zip(indices, drawn, strict=True))
        rows = [row for row, key in enumerate(keys) if key not in self._log_probs]
        answers = dict(self._log_probs)
        if rows:
            answers |= self._answers(batch.input_features[rows], [keys[row] for row in rows])
        tables = [answers[key] for key in keys]
        prompt = len(self.prompts[0])
        inputs = [torch.tensor([*self.prompts[key[1]], *self._transcripts[key]]) for key in keys]
        # An input is followed by its target; before the last token of the prompt none counts.
        length = max(map(len, inputs))
        log_probs = torch.zeros(len(keys), length, tables[0].shape[-1])
        is_target = torch.zeros(len(keys), length, dtype=torch.bool)
        for row, table in enumerate(tables):
            targets = slice(prompt - 1, prompt - 1 + len(table))
            log_probs[row, targets], is_target[row, targets] = table.float(), True
        padded = pad_sequence(inputs, batch_first=True, padding_value=self._end)
        return replace(batch, soft=SoftTargets(padded, log_probs, is_target, self.weight))

    def _answers(
        self, features: Tensor, keys: list[tuple[int, int]]
    ) -> dict[tuple[int, int], Tensor]:
        """Return float16 log-probabilities (tokens + end, vocabulary) of the transcripts."""
        self.adapters.clear()
        prompts = [self.prompts[language] for _, language in keys]
        states = encode(self.base, features)
        if unknown := [row for row, key in enumerate(keys) if key not in self._transcripts]:
            tokens_of = decode(self.base, states[unknown], [prompts[row] for row in unknown])
            room = self.base.net.config.max_target_positions - len(prompts[0])
            for row, tokens in zip(unknown, tokens_of, strict=True):
                self._transcripts[keys[row]] = tokens[:room]
        fresh = {}
        for key, table in zip(keys, self._log_probs_of(states, keys, prompts), strict=True):
            fresh[key] = table
            size = table.numel() * table.element_size()
            if self._bytes + size <= MAX_BYTES:
                self._bytes += size
                self._log_probs[key] = table
        return fresh

    @torch.inference_mode()
    def _log_probs_of(
        self, states: Tensor, keys: list[tuple[int, int]], prompts: list[list[int]]
    ) -> list[Tensor]:
        device = states.device
        rows = [
            torch.tensor([*p, *self._transcripts[k]]) for p, k in zip(prompts, keys, strict=True)
        ]
        inputs = pad_sequence(rows, batch_first=True, padding_value=self._end).to(device)
        logits = self.base.net(
            encoder_outputs=(states,), decoder_input_ids=inputs, use_cache=False
        ).logits
        first = len(prompts[0]) - 1
        return [
            logit[first : len(row)].float().log_softmax(-1).half().cpu()
            for logit, row in zip(logits, rows, strict=True)
        ]
