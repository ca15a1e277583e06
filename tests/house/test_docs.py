"""What the documentation lists is what the code has."""

import re
from pathlib import Path

from folovllm.attention.selector import BACKENDS
from folovllm.model_executor.models.registry import MODELS

DOCS = Path(__file__).parents[2] / "docs"


def test_engine_page_lists_every_attention_backend():
    listed = re.findall(r"^\| `(\w+)` \| (?:CPU|GPU|anywhere) \|", (DOCS / "engine.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(backend.name for backend in BACKENDS)


def test_every_architecture_is_named_in_the_readme():
    readme = (DOCS.parent / "README.md").read_text().replace("-", "").lower()
    families = {name.removesuffix("ForCausalLM").lower() for name in MODELS}
    assert {family for family in families if family not in readme} == set()
