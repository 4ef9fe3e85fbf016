"""Where the time of a step goes: a profile's events summed up by the part of training that they belong to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch.autograd import DeviceType

from sftx.model.head import HEAD
from sftx.parallel.stepper import CLIP
from sftx.training.measure.flops import Linear, Work
from sftx.training.measure.perf import peak_flops, peak_memory

if TYPE_CHECKING:
    from sftx.training.trial import Session, Trial

DATA = "sftx: next batches"
"""Name of the wait for data in a profile."""
PRODUCTS = "matrix products of the layers"
PARTS = {"data": DATA, "head and loss": HEAD, "clipping": CLIP, "optimizer": "Optimizer.step"}
"""What surrounds a part's operations, by the part's name; the nearest one counts."""
ATTENTION = ("_Attention", "scaled_dot_product", "flash", "varlen_attn", "efficient_attention", "cudnn_attention")
MATRIX = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::_int_mm")
DEQUANTIZE = ("dequantize", "bitsandbytes")
REST = "norms, activations, sums, copies"


def parts_of(events: Iterable[Any]) -> dict[str, float]:
    """Return each part's share of the time, the GPU's where one was used; the shares sum to 1.

    A kernel appears three times in a profile: with the operation that launched it, as an event of the GPU, and in
    the time of each annotation around it. It is counted with its operation.
    """
    seconds: dict[str, float] = {}
    events = list(events)
    on_gpu = any(event.device_type != DeviceType.CPU for event in events)
    for event in events:
        if on_gpu and (event.device_type != DeviceType.CPU or event.is_user_annotation):
            continue
        own = sum(kernel.duration for kernel in event.kernels) if on_gpu else event.self_cpu_time_total
        if own > 0:
            part = _part(event)
            seconds[part] = seconds.get(part, 0.0) + own
    total = sum(seconds.values()) or 1.0
    return {part: value / total for part, value in sorted(seconds.items(), key=lambda one: -one[1])}


def _part(event: Any) -> str:
    at: Any = event
    while at is not None:
        for part, name in PARTS.items():
            if at.name.startswith(name):
                return part
        if any(word in at.name for word in ATTENTION):
            return "attention"
        at = at.cpu_parent
    if event.name in MATRIX:
        return PRODUCTS
    return "4-bit weights" if any(word in event.name for word in DEQUANTIZE) else REST


def report_of(shares: dict[str, float], session: Session, trial: Trial) -> dict[str, Any]:
    """Return shares, and rates over the steps since the last record that were not traced."""
    window = trial.window if trial.window.seconds else trial.last_window
    device, dtype = session.engine.device, session.numerics.dtype
    report: dict[str, Any] = {"shares": {part: round(share, 4) for part, share in shares.items()}}
    if window is None:
        return report
    report |= {name.removeprefix("perf/"): value for name, value in window.metrics(device, dtype).items()}
    peak = peak_flops(device, dtype)
    report["peak_memory_gb"] = peak_memory(device) / 1e9
    if peak and window.flops and session.work:
        report["peak_tflops"] = peak / 1e12
        again = _recomputed(session.work, session.model.recomputed_part, window.own_tokens)
        report["hfu"] = (window.flops + again) / max(window.seconds, 1e-9) / peak
    return report


def _recomputed(work: Work, part: float, tokens: int) -> int:
    """Return the operations of the blocks' second forward pass; that of attention is left out."""
    return int(part * sum(Linear(one.inner, one.outer, 1).flops(tokens) for one in work.layers))


def table_of(report: dict[str, Any]) -> str:
    """Return a report as text."""
    lines = [f"{'share of the time':40}"]
    lines += [f"  {part:38}{share:7.1%}" for part, share in report["shares"].items()]
    names = {
        "tokens_per_second": ("tokens/s", ",.0f"),
        "supervised_tokens_per_second": ("supervised tokens/s", ",.0f"),
        "padding": ("padding", ".1%"),
        "data_wait": ("waiting for data", ".1%"),
        "peak_memory_gb": ("peak memory, GB", ".2f"),
        "peak_tflops": ("the machine's TFLOP/s", ".3f"),
        "tflops": ("TFLOP/s of the work", ".3f"),
        "mfu": ("MFU", ".1%"),
        "hfu": ("HFU, recomputation counted", ".1%"),
    }
    lines += [f"{text:40}{format(report[key], how):>7}" for key, (text, how) in names.items() if key in report]
    return "\n".join(lines) + "\n"
