"""A whole job, from import to scores: `fit` against `Seq2SeqTrainer` with PEFT LoRA.

    python benchmarks/end_to_end.py

The pocket Whisper on its German train set: score the base on the test set, take so many steps,
score again, keep the adapter. Same rank, layers, batches, steps, learning rate and schedule, greedy
decoding in batches of 64. Each run is a process of its own, in turn, with its imports compiled.
`fit` runs twice, without its cache of features and with it; the rival computes them up front, each
time. `fit` also writes checkpoints, and gives its error rates, raw and normalised, with bootstrap
intervals.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import Results, compared, parse, parser, print_table, shown, spread

LANGUAGE = "de"
RANK, BATCH_SIZE, EVALUATION_BATCH_SIZE, LR = 16, 16, 64, 1e-3
FIRST, CACHED, PEER = "fit, first time", "fit, features cached", "Seq2SeqTrainer + PEFT"
CONTESTANTS = (PEER, FIRST, CACHED)
REPEATS = 5
# What passes between two marks of a run, in order.
MARKS = ("started", "imported", "loaded", "base scored", "first step", "last step", "done")
STAGES = ("import", "load and features", "score the base", "first step", "other steps", "the rest")


class Watch:
    """The times at which a run passed its marks, and how long it waited for batches."""

    def __init__(self, started: float) -> None:
        """Start with the time at which the parent process started this one."""
        self.marks = {"started": started}
        self.waited = 0.0

    def mark(self, name: str) -> None:
        """Note the time of a mark, if it is the first of its name."""
        self.marks.setdefault(name, time.time())

    def step(self) -> None:
        """Note that a step is done."""
        self.mark("first step")
        self.marks["last step"] = time.time()

    def waiting(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """Return `load`, timed."""

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            found = load(*arguments)
            self.waited += time.perf_counter() - started
            return found

        return timed

    def report(self, error: float) -> None:
        """Print one line of JSON."""
        self.mark("done")
        times = [self.marks[name] for name in MARKS]
        stages = dict(zip(STAGES, (b - a for a, b in pairwise(times)), strict=True))
        steps = stages["first step"] + stages["other steps"]
        found = {"stages": stages, "total": times[-1] - times[0], "waited": self.waited / steps}
        print(json.dumps({**found, "start_up": times[4] - times[0], "error": error}))


def main() -> None:
    """Make all runs, in turn; with `--case` one of them in this process."""
    found = parser(__doc__)
    found.add_argument("--steps", type=int, default=100)
    found.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    arguments = parse(found)
    if arguments.case:
        name, started = arguments.case
        run = fit_with_trainer if name == PEER else fit_with_ours
        run(Watch(float(started)), arguments.steps)
        return
    steps = 2 if arguments.quick else arguments.steps
    results = Results(arguments, steps=steps, batch_size=BATCH_SIZE, rank=RANK, repeats=REPEATS)
    with tempfile.TemporaryDirectory() as folder:  # for caches and runs
        for number in range(1 if arguments.quick else REPEATS):
            measure = partial(one_round, arguments, steps, Path(folder), number)
            results.case(f"round {number}", measure)
    rounds = list(results.cases.values())
    table = {
        quantity: compared(
            {name: [value_of(one[name], quantity) for one in rounds] for name in CONTESTANTS}, PEER
        )
        for quantity in (*STAGES, "start_up", "total")
    }
    waited = {name: spread([one[name]["waited"] for one in rounds]) for name in CONTESTANTS}
    results.write(summary=table, share_of_steps_spent_on_batches=waited)
    rows: list[tuple[str, ...]] = []
    for quantity, by in table.items():
        ours = [(by[name]["seconds"], by[name]["ratio"]["median"]) for name in CONTESTANTS[1:]]
        cells = [f"{shown(seconds)} ({ratio:.2f})" for seconds, ratio in ours]
        rows.append((quantity, shown(by[PEER]["seconds"]), *cells))
    shares = [shown(waited[name], ".1%") for name in CONTESTANTS]
    rows.append(("share of the steps spent on batches", *shares))
    rows.append(("raw WER after", *(f"{rounds[0][name]['error']:.3f}" for name in CONTESTANTS)))
    print_table((f"seconds (ratio), {steps} steps", *CONTESTANTS), rows)


def value_of(run: dict[str, Any], quantity: str) -> float:
    """Return the seconds of a stage, or of the whole."""
    return {**run, **run["stages"]}[quantity]


def one_round(arguments: argparse.Namespace, steps: int, folder: Path, number: int) -> dict:
    """Return one run of each; before the first round one that compiles what is imported."""
    from blora_pyro.data import MODEL_DIR, corpus_dir

    bytecode = folder / "bytecode"
    if not bytecode.exists():
        bytecode.mkdir()
        one_round(arguments, 1, folder, -1)
    found = {}
    for name in CONTESTANTS:
        command = [sys.executable, __file__, "--threads", str(arguments.threads)]
        command += ["--steps", str(steps), "--case", name, str(time.time())]
        place = {
            "BLORA_PYRO_CACHE": str(folder / f"cache-{number}"),
            "BENCHMARK_OUTPUT": str(folder / f"{name}-{number}"),
            "BENCHMARK_MODEL": str(MODEL_DIR),
            "BENCHMARK_CORPUS": str(corpus_dir(LANGUAGE)),
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": str(bytecode),
        }
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | place
        )
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def fit_with_ours(watch: Watch, steps: int) -> None:
    """Call the library's one function."""
    from blora_pyro import FitConfig, fit
    from blora_pyro.data import Examples
    from blora_pyro.runs.listeners import Listener

    watch.mark("imported")
    Examples.batch = watch.waiting(Examples.batch)  # type: ignore[method-assign]

    class Marks(Listener):
        def stage(self, name: str) -> None:
            if name.startswith("base on"):
                watch.mark("loaded")

        def ready(self, *about: Any) -> None:
            watch.mark("base scored")

        def step(self, step: Any) -> None:
            watch.step()

    config = FitConfig(
        data=LANGUAGE, backward={}, rank=RANK, steps=steps, batch_size=BATCH_SIZE, lr=LR
    )
    run = fit(config, os.environ["BENCHMARK_OUTPUT"], progress=Marks())
    watch.report(run.metrics["new_domain"]["adapted"]["wer"]["raw"]["rate"])


def fit_with_trainer(watch: Watch, steps: int) -> None:
    """Do the same job as transformers' and PEFT's guides do it."""
    import jiwer
    import pyarrow.parquet
    import soundfile
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        TrainerCallback,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

    watch.mark("imported")
    folder, corpus = os.environ["BENCHMARK_MODEL"], Path(os.environ["BENCHMARK_CORPUS"])
    net = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    tokenizer.set_prefix_tokens(language=LANGUAGE, task="transcribe")
    net.generation_config.language, net.generation_config.task = LANGUAGE, "transcribe"

    def rows(split: str) -> list[dict[str, Any]]:
        found = []
        for row in pyarrow.parquet.read_table(corpus / f"{split}.parquet").to_pylist():
            wave, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
            features = extractor(wave, sampling_rate=rate).input_features[0]
            labels = tokenizer(row["text"]).input_ids
            found.append({"input_features": features, "labels": labels})
        return found

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        features = [{"input_features": one["input_features"]} for one in batch]
        found = extractor.pad(features, return_tensors="pt")
        labels = tokenizer.pad([{"input_ids": one["labels"]} for one in batch], return_tensors="pt")
        ids = labels["input_ids"].masked_fill(labels["attention_mask"].ne(1), -100)
        if (ids[:, 0] == net.config.decoder_start_token_id).all():
            ids = ids[:, 1:]
        return {**found, "labels": ids}

    def score(predicted: Any) -> dict[str, float]:
        ids = [
            [token if token != -100 else tokenizer.pad_token_id for token in row]
            for part in (predicted.label_ids, predicted.predictions)
            for row in part.tolist()
        ]
        texts = [one.strip() for one in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        half = len(texts) // 2
        return {"wer": jiwer.wer(texts[:half], texts[half:])}

    class Marks(TrainerCallback):
        def on_step_end(self, *about: Any, **more: Any) -> None:
            watch.step()

    train, test = rows("train"), rows("test")
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    output = os.environ["BENCHMARK_OUTPUT"]
    trainer = Seq2SeqTrainer(
        model=get_peft_model(net, lora),
        args=Seq2SeqTrainingArguments(
            output_dir=output,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=EVALUATION_BATCH_SIZE,
            learning_rate=LR,
            max_steps=steps,
            warmup_steps=steps // 10,
            lr_scheduler_type="cosine",
            max_grad_norm=0.0,
            predict_with_generate=True,
            generation_num_beams=1,
            remove_unused_columns=False,
            label_names=["labels"],
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        train_dataset=train,
        eval_dataset=test,
        data_collator=watch.waiting(collate),
        compute_metrics=score,
        callbacks=[Marks()],
    )
    watch.mark("loaded")
    trainer.evaluate()
    watch.mark("base scored")
    watch.waited = 0.0
    trainer.train()
    waited = watch.waited
    after = trainer.evaluate()
    watch.waited = waited
    trainer.save_model(output)
    watch.report(after["eval_wer"])


if __name__ == "__main__":
    main()
