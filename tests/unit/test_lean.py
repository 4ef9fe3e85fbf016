"""What is imported for less is the same."""

from __future__ import annotations

from tests.unit.test_standins import run_alone


def test_transformers_knows_the_same_exports() -> None:
    """In another process, as it reads them when it is imported; the second reading is the first."""
    run_alone("""
from sftx.model.lean import EXPORTS, read_exports_once
read_exports_once()
import importlib.util, sys
from pathlib import Path
import transformers.models
ours = sys.modules[EXPORTS]
spec = importlib.util.spec_from_file_location("transformers.utils.plain", ours.__file__)
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)
models = Path(transformers.models.__file__).parent
found, wanted = (module.define_import_structure(models) for module in (ours, plain))
assert found == wanted and len(found) > 5
assert ours.create_import_structure_from_path.cache_info().hits > 400
for text in ("", "x = 1", '__all__ = ["a", "b"]', 'x\\n__all__ = [\\n    "a",\\n]\\n', '__all__ = ["a"]\\nx\\n__all__ = ["b"]',
             'x__all__ = ["a"]', ' __all__ = ["a"]'):
    assert ours.fetch__all__(text) == plain.fetch__all__(text), text
""")
