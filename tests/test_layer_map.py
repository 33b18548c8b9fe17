import pytest

from limbeck.errors import ConfigError
from limbeck.layer_map import LayerMap


@pytest.mark.parametrize("student", range(1, 9))
@pytest.mark.parametrize("teacher", range(1, 13))
def test_uniform_map_reaches_both_ends(student, teacher):
    if student > teacher:
        with pytest.raises(ConfigError):
            LayerMap.uniform(student, teacher)
        return
    pairs = LayerMap.uniform(student, teacher).pairs
    assert [s for s, _ in pairs] == list(range(student))
    assert student == 1 or pairs[0] == (0, 0)
    assert pairs[-1] == (student - 1, teacher - 1)


def test_surviving_layers_are_mapped_in_order():
    assert LayerMap.surviving([1, 4, 5]).pairs == ((0, 1), (1, 4), (2, 5))
    with pytest.raises(ConfigError, match=r"\(0, 4\) is followed by \(1, 1\)"):
        LayerMap.surviving([4, 1])


def test_layers_are_counted_from_zero():
    with pytest.raises(ConfigError, match="counted from 0"):
        LayerMap(((-1, 0), (0, 1)))


@pytest.mark.parametrize("pairs", [((0, 0), (0, 1)), ((1, 0), (0, 1)), ((0, 3), (1, 2))])
def test_a_layer_map_must_increase(pairs):
    with pytest.raises(ConfigError, match="must go up in both models"):
        LayerMap(pairs)
