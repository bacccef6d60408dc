"""What a fit says that ends before its last step."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from blora_pyro.errors import Interrupted, ProcessLost, UserError
from blora_pyro.runs.fit_folders import FitFolder


@contextmanager
def told(folder: FitFolder) -> Iterator[None]:
    """In here what ends a fit early says in one line what happened, what is safe, what to do.

    Raises:
        Interrupted: By a signal.
        FloatingPointError: If the loss is not finite.
        UserError: If the folder can't be written any more, memory is full, or one of several
            processes is gone.
    """
    try:
        yield
    except ProcessLost as error:
        raise UserError(f"{error}; {folder.safe()}; {folder.way_on()}") from None
    except Interrupted as error:
        message = f"interrupted; {folder.safe()}; {folder.way_on()}"
        raise Interrupted(error.signum, message) from None
    except FloatingPointError as error:
        again = "" if folder.path is None else f"; {folder.safe()}, but leads to the same"
        raise FloatingPointError(f"{error}{again}") from None
    except OSError as error:
        if folder.path not in Path(str(error.filename)).parents:
            raise
        raise UserError(
            f"{error.filename} can't be written ({error.strerror}); {folder.safe()}; put that "
            f"right, then {folder.way_on()}"
        ) from None
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory; {folder.safe()}; free some and {folder.way_on()} (or start another "
            "fit with gradient_accumulation, gradient_checkpointing or a smaller batch_size)"
        ) from None


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory is full, that of a GPU or the machine's."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    kinds = (MemoryError, torch.cuda.OutOfMemoryError)
    return isinstance(error, kinds) or any(word in str(error) for word in words)
