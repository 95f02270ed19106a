"""What the library takes and returns, and the package `bitpress` itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitpress.pipeline.api import convert, load, quantize
from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.objects import Measurements, Recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The folders of the repository as pyproject.toml maps them: bitpress itself is pipeline/package."""
    package = tmp_path / "site" / "bitpress"
    package.mkdir(parents=True)
    for name in ("pipeline", "kernels", "eval", "configs"):
        (package / name).symlink_to(ROOT / name)
    (package / "__init__.py").symlink_to(ROOT / "pipeline" / "package" / "__init__.py")
    return package.parent


def test_import_bitpress(installed: Path):
    program = """if True:
        import sys
        import bitpress
        assert not {"torch", "transformers"} & set(sys.modules)
        assert set(bitpress.__all__) <= set(dir(bitpress))
        assert bitpress.__version__[0].isdigit()
        assert bitpress.quantize.__doc__
        assert "bitpress.pipeline.hf" not in sys.modules  # which changes what transformers does
        for name in bitpress.__all__:
            assert getattr(bitpress, name) is not None
        import bitpress.pipeline
        assert bitpress.quantize is bitpress.pipeline.quantize
        assert set(bitpress.pipeline.__all__) == set(bitpress.__all__) - {"__version__"}
        assert not hasattr(bitpress, "nonesuch")
    """
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_recipe():
    recipe = Recipe("gptq/int4-g128", layers={"*.down_proj": "int8-g128"})
    assert (recipe.method, recipe.scheme, recipe.layers) == ("gptq", "int4-g128", {"*.down_proj": "int8-g128"})
    assert repr(recipe) == "Recipe(method='gptq', layers={'*.down_proj': 'int8-g128'}, scheme='int4-g128')"
    assert Recipe("4.25bits", choices=["int4-g32"]).label == "4.25bits"
    assert "gptq-int4-g128-mixed" in recipe._repr_html_()
    with pytest.raises(ConfigError, match="method 'gtpq' is unknown; did you mean gptq"):
        Recipe("gtpq/int4-g128")
    with pytest.raises(ConfigError, match="lyers: unknown key; did you mean layers"):
        Recipe("int4-g128", lyers={})


def test_what_is_returned_says_what_it_is(tiny_llama: Path, tmp_path: Path):
    folder = tmp_path / "<b>"
    artifact = quantize(tiny_llama, Recipe("int4-g32"), folder)
    assert "int4-g32, scheme int4-g32, format gptq, quantized layers 14" in repr(artifact)
    assert "&lt;b&gt;" in artifact._repr_html_()
    loaded = load(folder)
    model, _ = loaded
    assert repr(loaded).startswith("Loaded(model LlamaForCausalLM, dtype bfloat16, device cpu")
    assert "<table>" in loaded._repr_html_()
    with pytest.raises(ConfigError, match=r"model is a LlamaForCausalLM, expected a Hub id or a folder: .* save it by"):
        quantize(model, "int4-g32", tmp_path / "out")  # type: ignore[arg-type]
    assert convert(folder, "compressed-tensors", tmp_path / "other").notes
    measured = Measurements(quality={"perplexity": 9.125, "kl_mean": None}, size={"file_bytes": 2_000_000})
    assert repr(measured) == "Measurements(perplexity 9.125, 2.00 MB; keys: quality, size)"
