"""The learning rate is transformers' own, and a pure function of the step."""

import pytest
import torch
from transformers import get_scheduler

from limbeck.config import OptimConfig
from limbeck.errors import ConfigError
from limbeck.train.schedule import make_schedule, schedule_names

OPTIONS = {
    "warmup_stable_decay": {"num_decay_steps": 5},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
}


def optim(name: str, **more) -> OptimConfig:
    warmup = 0 if name == "constant" else 3
    given = {"steps": 20, "warmup_steps": warmup, "schedule_options": OPTIONS.get(name, {})}
    return OptimConfig(learning_rate=0.5, schedule=name, **(given | more))


@pytest.mark.parametrize("name", schedule_names())
def test_rates_are_those_of_transformers_and_need_no_state(name):
    config = optim(name)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    scheduler = get_scheduler(
        name, optimizer, config.warmup_steps, 20, dict(config.schedule_options)
    )
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rate = make_schedule(config, 0.5)
    backwards = [rate(step) for step in reversed(range(20))][::-1]
    assert backwards == pytest.approx(expected)


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"no such schedule 'cosin' \(did you mean 'cosine'"):
        make_schedule(optim("cosin"), 0.1)
    with pytest.raises(ConfigError, match="no such schedule 'reduce_lr_on_plateau'"):
        make_schedule(optim("reduce_lr_on_plateau"), 0.1)


def test_an_unknown_a_missing_and_a_wrong_option_are_refused():
    with pytest.raises(ConfigError, match=r"takes no such option.*num_cycles"):
        make_schedule(optim("cosine", schedule_options={"cycles": 2}), 0.1)
    with pytest.raises(ConfigError, match=r"num_decay_steps.*is missing"):
        make_schedule(optim("warmup_stable_decay", schedule_options={}), 0.1)
    with pytest.raises(ConfigError, match="must suit the schedule"):
        make_schedule(optim("polynomial", schedule_options={"lr_end": 1.0}), 0.1)


def test_a_warm_up_that_would_be_ignored_is_refused():
    with pytest.raises(ConfigError, match="constant_with_warmup"):
        make_schedule(optim("constant", warmup_steps=5), 0.1)
