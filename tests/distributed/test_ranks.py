"""Which processes have a mesh."""

import pytest
import torch

from limbeck.distributed import world
from limbeck.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ((), None),
        (("none", "float32"), None),
        (("always",), (1,)),
        (("auto", "bfloat16"), (1,)),
        (("none", "bfloat16"), (1, 1)),
    ],
)
def test_one_process_has_a_mesh_where_the_recipe_asks_for_what_only_fsdp2_does(options, shape):
    with world(torch.device("cpu"), *options) as here:
        assert (here.rank, here.size) == (0, 1)
        assert (None if here.mesh is None else here.mesh.shape) == shape


def test_a_device_without_collectives_is_refused():
    refused = pytest.raises(ConfigError, match="need CPU or CUDA, got device 'mps'")
    with refused, world(torch.device("mps"), "always"):
        pass
