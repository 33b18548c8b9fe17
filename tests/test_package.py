"""What `import limbeck` gives, and what it does not drag in."""

import subprocess
import sys
from pathlib import Path

import pytest

import limbeck

LOSS_ALONE = """
import sys
from pathlib import Path
from limbeck import DistillationLoss
DistillationLoss(alpha=0.5)
assert "transformers" not in sys.modules, "the loss needs no model library"
"""


COMMAND_LINE = """
import sys
from limbeck.commands import run
sys.argv = ["limbeck", *{words}]
assert run() == {code}
print([name for name in {libraries} if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("words", "code", "libraries"),
    [
        (["--help"], 0, ["torch", "pydantic"]),
        (["distill", "no/recipe.yaml"], 2, ["torch", "transformers"]),
        (["check", "--plan", "no/recipe.yaml", "optim.steps=1"], 2, ["torch", "transformers"]),
    ],
)
def test_an_answer_that_needs_no_model_imports_no_large_library(words, code, libraries):
    """PyTorch and transformers take seconds to import, and a typo should not wait for them."""
    script = COMMAND_LINE.format(words=words, code=code, libraries=libraries)
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_loss_needs_no_model_library():
    subprocess.run([sys.executable, "-c", LOSS_ALONE], check=True)


def test_every_public_name_can_be_imported():
    assert set(limbeck.__all__) <= set(dir(limbeck))
    for name in limbeck.__all__:
        assert vars(limbeck).get(name) is not None or limbeck.__getattr__(name) is not None


def test_other_names_raise_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        limbeck.distil  # noqa: B018


def test_every_folder_of_the_package_is_installed():
    """Setuptools leaves folders without `__init__.py` out of a wheel."""
    root = Path(limbeck.__file__).parent
    folders = {path.parent for path in root.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []
