"""A posterior mean as a stock PEFT adapter: two files that PEFT and transformers read."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from blora_pyro.models.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from blora_pyro.posterior.posterior import Posterior


def save_adapter(posterior: "Posterior", folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    A and B of every layer are (rank, in_features) and (out_features, rank).

    Args:
        posterior: Of one adapter, see `Posterior.for_domain`.
        folder: Made if it is not there.
    """
    from peft import LoraConfig

    # task_type stays None: PEFT's sequence-to-sequence wrapper does not take Whisper's inputs.
    ranks = {name: group.rank for group in posterior.groups for name in group.modules}
    other = {name: rank for name, rank in ranks.items() if rank != posterior.rank}
    LoraConfig(
        base_model_name_or_path=posterior.base,
        revision=posterior.revision,
        r=posterior.rank,
        lora_alpha=posterior.alpha,
        target_modules=list(ranks),
        rank_pattern=other,
        alpha_pattern={name: posterior.scaling * rank for name, rank in other.items()},
        inference_mode=True,
    ).save_pretrained(str(folder))
    path = folder / ADAPTER_CONFIG  # PEFT keeps the targets in a set: fix their order
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {}
    for name, a, b in posterior.layer_means():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.cpu().contiguous()
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
