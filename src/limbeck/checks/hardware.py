"""Devices that a plan can be made for: figures that their makers state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from limbeck.errors import ConfigError


@dataclass(frozen=True)
class Hardware:
    """One device in a cluster, by its maker's figures.

    Attributes:
        name: As the command line has it.
        memory_gib: Memory of a device.
        tflops: Dense bfloat16 matrix products, 10^12 a second.
        link_gb_s: To other devices of its node, one direction, 10^9 bytes a second.
        network_gb_s: Of its share of the node's network, one direction.
        per_node: Devices of a node.
    """

    name: str
    memory_gib: float
    tflops: float
    link_gb_s: float
    network_gb_s: float
    per_node: int = 8

    @property
    def memory_bytes(self) -> int:
        """Memory of a device."""
        return int(self.memory_gib * 2**30)

    def bytes_per_second(self, ranks: int, stride: int = 1) -> float:
        """What a ring over some ranks moves through each of them, one direction.

        A ring over several nodes enters and leaves each node once, over all of its network. Of
        ranks that are not neighbours there are `stride` such rings at the same time, which share
        the network of a node.
        """
        if ranks * stride <= self.per_node:
            return self.link_gb_s * 1e9
        rings = min(stride, self.per_node)
        return min(self.link_gb_s, self.network_gb_s * self.per_node / rings) * 1e9


HARDWARE: Mapping[str, Hardware] = MappingProxyType(
    {
        each.name: each
        for each in (
            Hardware("a100-40", 40.0, 312.0, 300.0, 25.0),
            Hardware("a100-80", 80.0, 312.0, 300.0, 25.0),
            Hardware("h100", 79.6, 989.0, 450.0, 50.0),
            Hardware("h200", 140.4, 989.0, 450.0, 50.0),
            Hardware("b200", 167.6, 2250.0, 900.0, 50.0),
            Hardware("l40s", 45.0, 362.0, 32.0, 25.0),
            Hardware("4090", 23.9, 165.0, 32.0, 12.5),
        )
    }
)
"""By NVIDIA's data sheets, as far as they were at hand; check a figure before relying on it.
Dense bfloat16 with float32 sums, NVLink or PCIe in one direction;
memory as nvidia-smi shows it, of B200 the sheet's 180 GB. The network is that of DGX nodes: one
adapter of 200 Gbit/s (A100) or 400 Gbit/s a device. L40S and 4090 have no such node: 8 on PCIe 4.0
with 200 and 100 Gbit/s a device are assumed."""


def read_hardware(text: str) -> Hardware:
    """A device by its name, with other figures where the text has some.

    Example:
        >>> read_hardware("h100,per_node=4,network_gb_s=25").per_node
        4

    Raises:
        ConfigError: No such device, or no such figure.
    """
    name, *changes = (part.strip() for part in text.split(","))
    if name not in HARDWARE:
        raise ConfigError(
            f"--device must be one of {', '.join(HARDWARE)}, got {name!r}. Take the nearest and "
            "give its figures, as in --device h100,memory_gib=94,tflops=800."
        )
    hardware = HARDWARE[name]
    figures = [field.name for field in dataclasses.fields(Hardware) if field.name != "name"]
    for change in changes:
        figure, _, value = change.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if figure not in figures or not 0 < number < float("inf"):
            raise ConfigError(
                f"--device: figures are {', '.join(figures)}, each a number above 0, got "
                f"{change!r} in {text!r}. Write them as h100,memory_gib=94."
            )
        if figure == "per_node":
            hardware = dataclasses.replace(hardware, per_node=math.ceil(number))
        else:
            numbers: dict[str, Any] = {figure: number}
            hardware = dataclasses.replace(hardware, **numbers)
    return hardware
