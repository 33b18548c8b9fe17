"""What pytest does not collect."""

import importlib.util

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("triton") is None:
    # There is none for this platform; their tests skip themselves.
    names = ("dense", "divergences", "launch", "memory", "sparse")
    collect_ignore_glob = [f"src/limbeck/losses/head/row_kernel/{name}.py" for name in names]
