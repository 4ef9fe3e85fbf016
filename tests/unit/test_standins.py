"""Stand-ins: what wants no more than names imports nothing, and everything else finds the real module.

Each case is a process of its own: what a process has imported stays.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tests.conftest import ROOT

HEAD = """
import sys
from sftx.standins import StandIn, stand_in
stand_in()
import torch

def there(name):
    return name in sys.modules and not isinstance(sys.modules[name], StandIn)
"""
CASES = {
    "names import nothing": """
        from torch.distributed.tensor import DTensor, Shard
        from torch.distributed.tensor.placement_types import _StridedShard
        import torch._dynamo
        assert not isinstance(torch.zeros(1), DTensor) and not issubclass(torch.Tensor, (DTensor, Shard))
        assert isinstance(1, DTensor | int) is True
        def annotated(x: DTensor | None) -> "Shard": ...
        torch._dynamo.graph_break()
        assert not there("torch.distributed.tensor") and not there("torch._dynamo") and not there("sympy")
        """,
    "what is called is real, and what was handed out before means it": """
        from torch.distributed.tensor import DTensor, Replicate, Shard
        shard = Shard(0)
        assert there("torch.distributed.tensor") and type(shard).__module__.startswith("torch.distributed.tensor")
        assert isinstance(shard, Shard) and not isinstance(shard, Replicate) and issubclass(type(shard), Shard)
        import torch.distributed.tensor as real
        assert real.Shard is type(shard) and torch.distributed.tensor is real
        class Mine(DTensor): ...
        assert Mine.__mro__[1] is real.DTensor
        """,
    "a module inside is the one that the real package has": """
        import torch.distributed.tensor._ops as inside
        import torch.distributed.tensor as package
        assert there("torch.distributed.tensor") and package._ops is inside is sys.modules[inside.__name__]
        import torch.distributed.tensor._dispatch as later
        assert package._dispatch is later and package.DTensor._op_dispatcher.__class__.__module__ == later.__name__
        """,
    "another name than those handed out": """
        import sympy
        x = sympy.Symbol("x")
        assert there("sympy") and sympy.simplify(x - x) == 0 and isinstance(x, sympy.Basic)
        """,
    "what is not to be compiled is not": """
        calls = []
        @torch.compiler.disable
        def apart(x):
            calls.append(torch.compiler.is_compiling())
            return x + 1
        @torch.compiler.disable(recursive=False)
        def also(x):
            return x - 1
        assert apart(torch.zeros(1)).item() == 1 and not there("torch._dynamo")
        compiled = torch.compile(lambda x: also(apart(x * 2)) * 3, backend="eager")
        assert compiled(torch.ones(1)).item() == 6 and there("torch._dynamo")
        assert calls == [False, False]
        """,
    "what is marked for the compiler stays so": """
        @torch._dynamo.assume_constant_result
        def constant():
            return 3
        assert constant() == 3 and not there("torch._dynamo")
        torch._dynamo.config.verbose
        assert there("torch._dynamo") and constant._dynamo_marked_constant
        """,
    "sizes without memory": """
        with torch.device("meta"):
            layer = torch.nn.Embedding(5, 3)
            angles = 1.0 / (10000.0 ** (torch.arange(0, 8, 2, dtype=torch.float) / 8))
        assert layer.weight.shape == (5, 3) and angles.shape == (4,) and angles.is_meta
        assert not there("torch.fx.experimental.symbolic_shapes")
        try:
            torch.empty(3, device="meta") + torch.empty(2, device="meta")
        except RuntimeError:
            pass
        else:
            raise AssertionError("sizes that do not fit were let through")
        """,
    "a model is exported": """
        assert not there("torch.export") and isinstance(sys.modules["torch.export"], StandIn)
        exported = torch.export.export(torch.nn.Linear(2, 3), (torch.ones(1, 2),))
        assert there("torch.export") and isinstance(exported, torch.export.ExportedProgram)
        assert exported.module()(torch.ones(1, 2)).shape == (1, 3)
        """,
    "optimizer and recomputation": """
        from torch.utils.checkpoint import checkpoint
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], fused=True, lr=0.1)
        checkpoint(lambda x: (x * weight).sum(), torch.ones(3), use_reentrant=False).backward()
        optimizer.step()
        assert torch.allclose(weight, torch.full((3,), 0.899)) and not there("torch._dynamo")
        """,
}


@pytest.mark.parametrize("case", CASES)
def test_stand_ins(case: str) -> None:
    run_alone(HEAD + "\n".join(line[8:] for line in CASES[case].splitlines()))


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_a_plain_run_imports_nothing_that_it_does_not_use(mode: str, tmp_path) -> None:
    words = [
        f"mode={mode}",
        "max_steps=1",
        "gradient_accumulation_steps=1",
        "tracker=none",
        f"output_dir={tmp_path / 'run'}",
    ]
    run_alone(f"""
import sys
sys.argv = ["train.py", *{words!r}]
import train
train.main(sys.argv[1:])
from sftx.standins import MODULES, StandIn
used = {"bitsandbytes", "bitsandbytes.nn"} if "mode=qlora" in sys.argv else set()
heavy = [*MODULES.keys() - used, "torch._dynamo", "torch._inductor", "torch.export", "torch.fx.experimental.symbolic_shapes"]
found = [name for name in heavy if name in sys.modules and not isinstance(sys.modules[name], StandIn)]
found += [name for name in ("datasets", "pandas", "transformers.trainer", "tensorboard", "wandb") if name in sys.modules]
assert not found, found
""")
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()


def run_alone(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
