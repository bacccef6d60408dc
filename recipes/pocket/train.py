"""Train the pocket Whisper on the monolingual corpora: cross-entropy plus an auxiliary CTC loss.

The CTC loss on the encoder makes a Whisper this small listen early; without it the decoder stays a
language model for thousands of steps. SpecAugment starts after the first quarter.
"""

import json
import logging
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile
import torch
from corpora import LANGUAGES, read
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

CHUNK_SECONDS = 3
FRAMES = CHUNK_SECONDS * 100
BPE_SIZE = 1000
STEPS = 10_000
BATCH = 32
PEAK_LR = 1.2e-3
WARM_UP = 600
CTC_WEIGHT = 0.5
SEED = 7
EXTRACTOR = WhisperFeatureExtractor(feature_size=80, chunk_length=CHUNK_SECONDS)

log = logging.getLogger(__name__)


def build_tokenizer(texts: list[str], folder: Path) -> WhisperTokenizer:
    """Byte-level BPE with Whisper's special tokens, in Whisper's order, without timestamps."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator((" " + text for text in texts), vocab_size=BPE_SIZE, min_frequency=2)
    state = json.loads(bpe.to_str())["model"]
    tokenizer = WhisperTokenizer(
        vocab=state["vocab"], merges=[tuple(merge) for merge in state["merges"]]
    )
    special = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES)]
    special += ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>"]
    special += ["<|nospeech|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens(
        {"pad_token": "<|endoftext|>", "additional_special_tokens": special[1:]}
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_model(tokenizer: WhisperTokenizer) -> WhisperForConditionalGeneration:
    """A Whisper of 3.5 million parameters and a three-second window, randomly initialised."""
    ids = tokenizer.convert_tokens_to_ids
    end, start = ids("<|endoftext|>"), ids("<|startoftranscript|>")
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=192,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=768,
        decoder_ffn_dim=768,
        max_source_positions=FRAMES // 2,
        max_target_positions=64,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    model = WhisperForConditionalGeneration(config)
    # The fused CPU attention's backward takes a third of a step in bf16; plain matmuls do not.
    model.set_attn_implementation("eager")
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        max_length=64,
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": ids(f"<|{code}|>") for code in LANGUAGES},
        task_to_id={"transcribe": ids("<|transcribe|>"), "translate": ids("<|translate|>")},
        no_timestamps_token_id=ids("<|notimestamps|>"),
        return_timestamps=False,
    )
    return model


def features_of(paths: list[str]) -> np.ndarray:
    """Log-mel features, (len(paths), 80, FRAMES), float16."""
    waves = [soundfile.read(path, dtype="float32")[0] for path in paths]
    out = EXTRACTOR(waves, sampling_rate=16_000, return_tensors="np")
    return out["input_features"].astype(np.float16)


def features(rows: list[dict], cache: Path) -> np.ndarray:
    """Features of all rows, (rows, 80, FRAMES), memory-mapped from `cache`."""
    if not cache.exists():
        chunks = [[row["audio"] for row in rows[i : i + 64]] for i in range(0, len(rows), 64)]
        # Spawned, not forked: a fork of a process that has used OpenMP threads can hang.
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            array = np.concatenate(list(pool.map(features_of, chunks)))
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, array)
    return np.load(cache, mmap_mode="r")


def targets(rows: list[dict], tokenizer: WhisperTokenizer) -> list[list[int]]:
    """Token sequences `<sot><language><transcribe><notimestamps> text <eot>`."""
    head = "<|startoftranscript|><|{}|><|transcribe|><|notimestamps|> {}<|endoftext|>"
    return [
        tokenizer(head.format(row["language"], row["text"]), add_special_tokens=False).input_ids
        for row in rows
    ]


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < WARM_UP:
        return PEAK_LR * (step + 1) / WARM_UP
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (STEPS - WARM_UP)))


def spec_augment(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Two frequency and two time masks an utterance; batch is (batch, mels, frames)."""
    size, mels, frames = batch.shape
    for dim, length, widest in ((1, mels, 15), (2, frames, 25)):
        for _ in range(2):
            width = torch.randint(0, widest + 1, (size, 1), generator=generator)
            first = (torch.rand(size, 1, generator=generator) * (length - width)).long()
            index = torch.arange(length)
            mask = (index >= first) & (index < first + width)
            batch = batch.masked_fill(mask.unsqueeze(3 - dim), 0.0)
    return batch


class Trainer:
    """The training loop, resumable at every checkpoint."""

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        mels: np.ndarray,
        tokens: list[list[int]],
        folder: Path,
    ) -> None:
        """Features `mels` (utterances, 80, FRAMES) with their token sequences."""
        self.model, self.mels, self.tokens, self.folder = model, mels, tokens, folder
        self.ctc = nn.Linear(model.config.d_model, model.config.vocab_size)
        self.nets = nn.ModuleDict({"whisper": model, "ctc": self.ctc})
        self.optimizer = torch.optim.AdamW(
            self.nets.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.step = 0

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Every parameter but the encoder's fixed sinusoids."""
        return [(name, p) for name, p in self.nets.named_parameters() if p.requires_grad]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Features (batch, 80, FRAMES) and padded tokens (batch, longest)."""
        per_epoch = len(self.tokens) // BATCH
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((SEED, epoch)).permutation(len(self.tokens))
        chosen = np.sort(order[place * BATCH : (place + 1) * BATCH])
        mel = torch.from_numpy(self.mels[chosen].astype(np.float32))
        longest = max(len(self.tokens[i]) for i in chosen)
        padded = torch.full((BATCH, longest), -100)
        for row, i in enumerate(chosen):
            padded[row, : len(self.tokens[i])] = torch.tensor(self.tokens[i])
        if step >= STEPS // 4:
            mel = spec_augment(mel, torch.Generator().manual_seed(SEED + step))
        return mel, padded

    def loss(self, mel: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every token after the start, and the CTC loss of the text tokens."""
        end = self.model.config.eos_token_id
        inputs = tokens[:, :-1].masked_fill(tokens[:, :-1] == -100, end)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.model(input_features=mel, decoder_input_ids=inputs)
            acoustic = self.ctc(out.encoder_last_hidden_state)
        logits = out.logits.float().transpose(1, 2)
        cross_entropy = nn.functional.cross_entropy(logits, tokens[:, 1:], ignore_index=-100)
        text = [row[(row != -100)][4:-1] for row in tokens]  # without prompt and end
        frames = torch.full((len(text),), acoustic.shape[1])
        lengths = torch.tensor([len(t) for t in text])
        scores = acoustic.float().log_softmax(-1).transpose(0, 1)
        ctc = nn.functional.ctc_loss(
            scores, torch.cat(text), frames, lengths, blank=end, zero_infinity=True
        )
        return cross_entropy, ctc

    def save(self) -> None:
        """Weights and optimiser moments, replaced atomically."""
        state = {f"net.{name}": p.detach() for name, p in self.trained()}
        for name, p in self.trained():
            moments = self.optimizer.state[p]
            state[f"exp_avg.{name}"] = moments["exp_avg"]
            state[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
        state["step"] = torch.tensor(self.step)
        fresh = self.folder / "checkpoint.new"
        save_file({name: value.contiguous() for name, value in state.items()}, fresh)
        os.replace(fresh, self.folder / "checkpoint.safetensors")

    def resume(self) -> None:
        """Continue from the last checkpoint, if there is one."""
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return
        state = load_file(path)
        self.step = int(state["step"])
        for name, p in self.trained():
            p.data.copy_(state[f"net.{name}"])
            self.optimizer.state[p] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": state[f"exp_avg.{name}"],
                "exp_avg_sq": state[f"exp_avg_sq.{name}"],
            }
        log.info("resumed at step %d", self.step)

    def run(self) -> None:
        """Train to STEPS."""
        self.resume()
        self.model.train()
        started, first, sums = time.monotonic(), self.step, np.zeros(2)
        while self.step < STEPS:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step)
            cross_entropy, ctc = self.loss(*self.batch(self.step))
            self.optimizer.zero_grad()
            (cross_entropy + CTC_WEIGHT * ctc).backward()
            nn.utils.clip_grad_norm_(self.nets.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            sums += cross_entropy.item(), ctc.item()
            if self.step % 100 == 0:
                pace = (time.monotonic() - started) / (self.step - first)
                log.info(
                    "step %d/%d  cross-entropy %.3f  ctc %.3f  %.3f s/step  %.0f min left",
                    self.step, STEPS, *(sums / 100), pace, pace * (STEPS - self.step) / 60,
                )  # fmt: skip
                sums[:] = 0
            if self.step % 500 == 0 or self.step == STEPS:
                self.save()


def train(corpora: Path, work: Path) -> Path:
    """The trained checkpoint folder `work/model`, in fp16."""
    out = work / "model"
    if (out / "model.safetensors").exists():
        return out
    torch.manual_seed(SEED)
    rows = [row for code in LANGUAGES for row in read(corpora / code / "train.jsonl")]
    mels = features(rows, work / "features.npy")
    tokenizer = build_tokenizer([row["text"] for row in rows], work / "tokenizer")
    model = build_model(tokenizer)
    log.info("%.2f M parameters, %d utterances", model.num_parameters() / 1e6, len(rows))
    Trainer(model, mels, targets(rows, tokenizer), work).run()
    tokenizer.save_pretrained(out)
    EXTRACTOR.save_pretrained(out)
    model.to(torch.float16).save_pretrained(out)
    return out
