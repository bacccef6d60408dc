"""The generative side: the Pyro program, its temperature, and the base models it can stand on."""

from blora_pyro.models.base import POCKET, Base, check_device, load_base
from blora_pyro.models.tempering import Temper
from blora_pyro.models.whisper import BLoRA, Prior

__all__ = ["POCKET", "BLoRA", "Base", "Prior", "Temper", "check_device", "load_base"]
