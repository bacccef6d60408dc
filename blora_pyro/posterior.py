"""The fitted posterior: draws, mean, sparsity, its file, and its export as a stock PEFT adapter."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from blora_pyro.adapters import Adapters, Group
from blora_pyro.errors import UserError
from blora_pyro.metrics import sparsity

FILE = "posterior.safetensors"


@dataclass(frozen=True)
class Posterior:
    """A mean-field posterior over the stacked factors A and B.

    Attributes:
        base: Name of the base model that it was fitted on.
        groups: Target layers by shape.
        alpha: Updates are scaled by alpha / rank.
        mean: Site name -> posterior mean, of the site's shape: (modules, rank, in_features) for
            `A_...`, (modules, out_features, rank) for `B_...`.
        stddev: Site name -> posterior standard deviation, likewise.
    """

    base: str
    groups: tuple[Group, ...]
    alpha: float
    mean: Mapping[str, Tensor]
    stddev: Mapping[str, Tensor]

    @property
    def rank(self) -> int:
        """Rank of every update."""
        return self.groups[0].rank

    @property
    def scaling(self) -> float:
        """Alpha / rank."""
        return self.alpha / self.rank

    @property
    def num_weights(self) -> int:
        """Number of adapter weights: elements of all A and B."""
        return sum(mean.numel() for mean in self.mean.values())

    def draws(self, count: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
        """`count` independent draws, one at a time: site name -> tensor of the site's shape."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            yield {
                name: mean + self.stddev[name] * noise.to(mean.device)
                for name, mean in self.mean.items()
                for noise in [torch.randn(mean.shape, generator=generator)]
            }

    def layer_means(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(layer name, A (rank, in_features), B (out_features, rank)) at the posterior mean."""
        for group in self.groups:
            stacks = self.mean[group.A.name], self.mean[group.B.name]
            yield from zip(group.modules, *stacks, strict=True)

    def delta_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(layer name, ΔW = alpha/rank · E[B] E[A] (out_features, in_features)), one at a time."""
        for name, a, b in self.layer_means():
            yield name, self.scaling * (b @ a)

    def sparsity(self, threshold: float = 1e-3) -> dict[str, float]:
        """Share of elements with |w| < threshold at the posterior mean, for `A`, `B`, `delta_w`."""
        parts: dict[str, list[Tensor]] = {"A": [], "B": []}
        for name, mean in self.mean.items():
            parts[name[0]].append(mean.cpu())
        return {
            **{factor: sparsity(means, threshold) for factor, means in parts.items()},
            "delta_w": sparsity((delta.cpu() for _, delta in self.delta_weights()), threshold),
        }

    @contextmanager
    def applied(
        self, net: nn.Module, factors: Mapping[str, Tensor] | None = None
    ) -> Iterator[None]:
        """`net` adapted by the posterior mean, or by `factors` (a draw), inside a `with`.

        Raises:
            UserError: If the net lacks the layers.
        """
        adapters = Adapters(net, self.groups, self.alpha)
        device = next(net.parameters()).device
        placed = {name: value.to(device) for name, value in (factors or self.mean).items()}
        try:
            with adapters.using(placed):
                yield
        finally:
            adapters.remove()

    @torch.no_grad()
    def merge(self, net: nn.Module) -> None:
        """Add ΔW of the posterior mean to the weights of `net`: no inference cost from then on.

        Raises:
            UserError: If the net lacks the layers.
        """
        Adapters(net, self.groups, self.alpha).remove()  # checks names and shapes
        for name, delta in self.delta_weights():
            weight = net.get_parameter(f"{name}.weight")
            weight.copy_(weight.float() + delta.to(weight.device))

    def save(self, folder: Path) -> None:
        """Write `posterior.safetensors`, and the mean as a PEFT adapter beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name}.mean": value for name, value in self.mean.items()}
        tensors |= {f"{name}.stddev": value for name, value in self.stddev.items()}
        about = {
            "base": self.base,
            "alpha": self.alpha,
            "groups": [asdict(group) for group in self.groups],
        }
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        save_file(tensors, folder / FILE, metadata={"blora_pyro": json.dumps(about)})
        self._save_adapter(folder)

    def _save_adapter(self, folder: Path) -> None:
        from peft import LoraConfig

        # task_type stays None: PEFT's sequence-to-sequence wrapper does not take Whisper's inputs.
        LoraConfig(
            base_model_name_or_path=self.base,
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=[name for group in self.groups for name in group.modules],
            inference_mode=True,
        ).save_pretrained(str(folder))
        path = folder / "adapter_config.json"  # PEFT keeps the targets in a set: fix their order
        config = json.loads(path.read_text(encoding="utf-8"))
        config["target_modules"].sort()
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        tensors = {}
        for name, a, b in self.layer_means():
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.cpu().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.cpu().contiguous()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path | str) -> "Posterior":
        """Read `posterior.safetensors` of a run folder.

        Raises:
            UserError: If there is none, or it is damaged.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise UserError(f"{folder} is no run folder (no {FILE}); give the --output of a fit")
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["blora_pyro"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            groups = tuple(
                Group(**{**group, "modules": tuple(group["modules"])}) for group in about["groups"]
            )
            if not groups:
                raise ValueError("no layers")
            sites = [site for group in groups for site in group.sites]
            mean = {site.name: tensors[f"{site.name}.mean"] for site in sites}
            stddev = {site.name: tensors[f"{site.name}.stddev"] for site in sites}
            for site in sites:
                for value in (mean[site.name], stddev[site.name]):
                    if tuple(value.shape) != site.shape:
                        raise ValueError(f"{site.name} has shape {tuple(value.shape)}")
            return cls(about["base"], groups, about["alpha"], mean, stddev)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is damaged or of another version ({error}); fit again, or give another run"
            ) from None
