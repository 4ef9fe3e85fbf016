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


def test_transformers_renames_weights_by_the_same_patterns() -> None:
    run_alone("""
import copy
import re
from sftx.model.lean import compile_patterns_later
from transformers import conversion_mapping, core_model_loading
read = conversion_mapping._build_checkpoint_conversion_mapping
plain = read()
compile_patterns_later()
compile_patterns_later()
ours = read()
assert ours.keys() == plain.keys() and len(ours) > 50
count = 0
for name in plain:
    for one, other in zip(ours[name], plain[name], strict=True):
        mine, theirs = copy.deepcopy(one).compiled_sources, other.compiled_sources
        assert isinstance(theirs, re.Pattern) and not isinstance(mine, re.Pattern)
        assert (mine.pattern, mine.flags, mine.groupindex) == (theirs.pattern, theirs.flags, theirs.groupindex)
        count += 1
assert count > 100
assert core_model_loading.re.sub("a", "b", "a") == "b"
""")
