"""How packages are named in advice."""

import tomllib
from pathlib import Path

from remap.io.versions import install_command


def test_advice_names_what_an_extra_installs() -> None:
    """As pyproject.toml has it: remap may have come from a folder or a wheel, where its own name finds nothing."""
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = extras["optional-dependencies"]
    assert install_command("heic") == f"pip install '{extras['heic'][0]}'" == "pip install 'pillow-heif>=1.0'"
    assert install_command("onnx") == f"pip install {' '.join(repr(one) for one in extras['onnx'])}"
