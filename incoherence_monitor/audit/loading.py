"""A model and its tokenizer from a folder, a GGUF file or a name, without the network unless it is asked for.

Layer 5: imports errors; transformers when a model is loaded.
"""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MissingDependencyError, ModelError, SettingError
from .memory import out_of_memory, too_large

DTYPES = ("auto", "float32", "bfloat16", "float16")
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Loaded:
    """A model that was loaded.

    Attributes:
        model: in evaluation mode.
        tokenizer: its own.
    """

    model: Any
    tokenizer: Any


def load(
    source: str | Path,
    *,
    gguf_file: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    tokenizer: str | None = None,
    download: bool = False,
) -> Loaded:
    """Load a model for scanning.

    Args:
        source: a folder as `save_pretrained` and the Trainer write it (weights may be sharded), a GGUF file or a
            folder that holds exactly one, or the name of a model in the local Hugging Face cache.
        gguf_file: name of the GGUF file in the folder, where it holds several.
        dtype: "auto" for that of the weights, or another of `DTYPES`.
        device_map: as transformers takes it ("auto", "cuda:0"); None for the CPU.
        tokenizer: folder or name to take the tokenizer from, where the model's own folder holds none.
        download: allow the network, for a name that is not in the cache.

    Returns:
        The model and its tokenizer.

    Raises:
        SettingError: if there is no such model, or a setting is out of range.
        ModelError: if it cannot be loaded, or does not fit in memory.
        MissingDependencyError: if transformers, or what a GGUF file or a device map needs, is not installed.
    """
    if dtype not in DTYPES:
        raise SettingError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}.")
    needed = {"transformers": "Loading a model"} | ({"accelerate": "A device map"} if device_map else {})
    for package, what in needed.items():
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, extra="hf", needed_for=what)
    source, gguf_file = _place(source, gguf_file)
    if gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise ModelError(f"Reading {gguf_file} needs the package 'gguf', which is not installed: pip install gguf.")
    local = Path(source).is_dir() or not download
    if Path(source).is_dir() and device_map is None:
        _check_memory(Path(source))
    kinds: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    kinds |= {"gguf_file": gguf_file} if gguf_file else {}
    import transformers

    with _quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(source, **kinds)
            # The class that was trained, so that layers have the names that its training knew.
            names = getattr(config, "architectures", None) or ()
            known = (getattr(transformers, name, None) for name in names)
            kind = next((each for each in known if each is not None), transformers.AutoModelForCausalLM)
            given = {"device_map": device_map} if device_map else {}
            model = kind.from_pretrained(source, dtype=dtype, **given, **kinds)
        except Exception as error:
            raise _why(source, error, download) from error
        try:
            where = kinds if tokenizer is None else {"local_files_only": not download, "trust_remote_code": False}
            return Loaded(model.eval(), transformers.AutoTokenizer.from_pretrained(tokenizer or source, **where))
        except Exception as error:
            raise ModelError(
                f"No tokenizer could be loaded from {tokenizer or source} ({_first_line(error)}); name the folder of "
                "one with --tokenizer."
            ) from error


def _place(source: str | Path, gguf_file: str | None) -> tuple[str, str | None]:
    """The folder or name, and the GGUF file in it."""
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise SettingError(f"{source} is a file and no GGUF; give the folder that holds the model.")
        return str(path.parent), path.name
    if path.is_dir():
        found = sorted(each.name for each in path.glob("*.gguf"))
        if gguf_file is not None:
            if gguf_file not in found:
                raise SettingError(f"There is no {gguf_file} in {source}; there is {', '.join(found) or 'no GGUF'}.")
            return str(path), gguf_file
        if (path / "config.json").is_file():
            return str(path), None
        if len(found) == 1:
            return str(path), found[0]
        raise SettingError(f"{source} is not a model: {_instead(path, found)}.")
    if gguf_file is None and (path.is_absolute() or str(source).startswith(".") or len(path.parts) > 2):
        raise SettingError(f"There is no folder {source}.")
    return str(source), gguf_file


def _instead(path: Path, ggufs: list[str]) -> str:
    if ggufs:
        return f"it holds several GGUF files; choose one with --gguf-file, of {', '.join(ggufs)}"
    inside = sorted(each.parent.name for each in path.glob("*/config.json"))
    more = f"; did you mean {', '.join(inside[:3])} in it" if inside else ""
    return f"it holds neither config.json nor a GGUF file{more}"


def _check_memory(folder: Path) -> None:
    """Refuse what cannot fit: where host memory runs out the system ends the process without a word."""
    sizes = [sum(each.stat().st_size for each in folder.glob(pattern)) for pattern in _WEIGHTS]
    needed = next((size for size in sizes if size), 0)
    free = _available()
    if free is not None and needed > free:
        what = f"{folder} has {needed / 2**30:.1f} GiB of weights, {free / 2**30:.1f} GiB of memory are free: the model"
        raise ModelError(too_large(what, "loading it"))


def _available() -> int | None:
    """Bytes of memory that can be had, None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _why(source: str, error: Exception, download: bool) -> Exception:
    """What to tell of a model that could not be loaded."""
    if out_of_memory(error):
        return ModelError(too_large(source, "loading it"))
    if not Path(source).is_dir() and isinstance(error, OSError):
        if not download:
            return SettingError(
                f"{source} is neither a folder nor a model in the local Hugging Face cache; give --download (in Python "
                "download=True) to fetch it from the hub."
            )
        return SettingError(f"{source} is no folder, and could not be fetched from the hub ({_first_line(error)}).")
    return ModelError(f"{source} could not be loaded ({type(error).__name__}: {_first_line(error)}).")


def _first_line(error: BaseException) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars where nobody looks; not every part of transformers asks whether they are wanted."""
    with ExitStack() as stack:
        if not sys.stderr.isatty():
            stack.enter_context(redirect_stderr(io.StringIO()))
        yield
