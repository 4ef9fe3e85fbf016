"""An NVIDIA GPU imitated by FakeTensors on `cuda:0`: shapes, dtypes, memory and calls are real, values are not.

Only for a process of its own: `load(library)` comes before torch, and torch is changed to believe in a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand",
    "lift_fresh", "new_empty", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose",
    "unfold", "unsqueeze", "view",
}  # fmt: skip
"""Operations that launch no kernel."""
READS = {"_local_scalar_dense", "allclose", "equal", "nonzero"}
"""Operations whose result the host waits for."""


def load(library: str) -> None:
    """Register the imitated device: see guard.cpp."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    for file in (folder / "libc10.so", folder / "libtorch_cpu.so", Path(library)):
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)


def _believe() -> None:
    """Let torch and sftx take the steps that they take on a GPU of compute capability 9.0."""
    import peft.tuners.lora.bnb  # noqa: F401 - with bitsandbytes, whose CUDA part cannot be imported
    import torch

    tensor = torch.tensor

    def make(data: Any, *, device: Any = None, **kwargs: Any) -> Any:
        made = tensor(data, **kwargs)  # torch itself would leave the dispatch mode out
        return made if device is None else made.to(device)

    torch.tensor = make  # type: ignore[assignment]

    def swap(old: Any, new: Any) -> None:  # `module.to`: the tensors have other owners, which torch does not allow
        if (old.device, old.dtype) != (new.device, new.dtype):
            old.data = new.data

    torch.utils.swap_tensors = swap
    torch.cuda.is_available = lambda: True
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign, assignment]


class FakeGpu:
    """Runs what is inside the `with` block on the imitated GPU, and counts.

    Tensors on the CPU stay real: the host can read those. Reading one on the GPU is recorded in `reads`, and answered
    with 0 or True, so that probes which compare results pass.
    """

    def __init__(self) -> None:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        _believe()
        self.device = torch.device("cuda", 0)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.bytes = self.peak = 0
        self.calls: Counter[str] = Counter()
        self.reads: list[str] = []
        self._storages: set[int] = set()

    @contextlib.contextmanager
    def running(self) -> Iterator[FakeGpu]:
        """Imitate the GPU inside the block."""
        with self.fake, _mode(self):
            yield self

    def start_counting(self) -> None:
        """Forget what was counted so far."""
        self.calls.clear()
        self.reads.clear()
        self.peak = self.bytes

    def note(self, name: str, tensors: list[Any]) -> None:
        """Count a call and the memory of its results."""
        if any(t.device.type == "cuda" for t in tensors) and name not in FREE:
            self.calls[name] += 1
        for tensor in tensors:
            if tensor.device.type == "cuda":
                self._track(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes)

    def _track(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.bytes += size

        def freed() -> None:
            self.bytes -= size
            self._storages.discard(key)

        weakref.finalize(storage, freed)


def _caller() -> str:
    """Return the line of sftx or transformers that is running."""
    frames = [f for f in traceback.extract_stack() if "/sftx/" in f.filename or "/transformers/" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the simulation"


def _mode(gpu: FakeGpu) -> Any:
    """Return the dispatch mode that stands between the program and FakeTensors."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
    from torch.utils._pytree import tree_leaves, tree_map_only

    def as_fake(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            name = func.overloadpacket.__name__
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            on_gpu = any(isinstance(t, FakeTensor) for t in given)
            target = torch.device(kwargs.get("device") or "cpu")
            if not on_gpu and target.type == "cpu":
                with _disable_current_modes():
                    return func(*args, **kwargs)
            if on_gpu and (name in READS or (name == "_to_copy" and kwargs.get("device") and target.type == "cpu")):
                gpu.reads.append(f"{name} in {_caller()}")
                if name in ("allclose", "equal", "_local_scalar_dense"):
                    return 0.0 if name == "_local_scalar_dense" and args[0].dtype != torch.bool else True
            if name == "_to_copy" and not on_gpu and not kwargs.get("non_blocking"):
                gpu.reads.append(f"blocking copy to the GPU in {_caller()}")
            args, kwargs = tree_map_only(torch.Tensor, as_fake, (args, kwargs))
            out = func(*args, **kwargs)
            gpu.note(name, [t for t in tree_leaves(out) if isinstance(t, FakeTensor)])
            return out

    return Mode()
