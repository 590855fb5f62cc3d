"""What the monitor computes within a model's forward, hidden from the dispatch modes that the user has entered.

Selective checkpointing is such a mode: it keeps outputs by operator and by how many calls of it came before. The
recomputation has not got the monitor's calls, so what the mode saw of them in the forward would be handed to the model
in place of its own.

Layer 3: imports torch alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

_NOTHING = nullcontext()


def unseen() -> AbstractContextManager[Any]:
    """A context in which no dispatch mode sees what is called; eager code alone."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else _NOTHING
